"""What other threads do with a module, step by step, while a call of it is under way in one."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall
from compile_tests.support.checkpoints import (
    expected_gradients,
    gradients,
    network,
    plain,
    values_for,
)
from compile_tests.support.models import MLP, parametrized
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import both
from compile_tests.support.threads import (
    SECONDS,
    Paused,
    Pauses,
    alive,
    in_a_thread,
    paused,
    run_beside,
    switching,
)
from fcall import scoped

X = torch.rand(4, 3)


def own_dicts(module: nn.Module) -> bool:
    """Whether all that a call may put beside a module is gone."""
    return all(type(m._parameters) is type(m._buffers) is dict for m in module.modules())


# --- what torch.func gets wrong -----------------------------------------------------------------


class Times(nn.Module):
    """Multiplies by a weight that is 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@both
def test_a_reader_sees_the_modules_own(call: Any) -> None:
    """torch.func shows it the other thread's values. Should this fail, torch has caught up."""
    module = Pauses(Times())
    with paused(module, {"child.weight": torch.tensor(3.0)}, torch.ones(()), call=call):
        seen = module.child.weight.item(), module(torch.ones(())).item()
    assert seen == ((2, 2) if call is fcall.functional_call else (3, 3))


@both
def test_calls_that_end_out_of_order(call: Any) -> None:
    """torch.func: one has the other's values, and the module keeps some for good.

    Should this fail, torch has caught up.
    """
    module = Pauses(Times())
    own = module.child.weight
    first = Paused(module, {"child.weight": torch.tensor(3.0)}, torch.ones(()), call)
    second = Paused(module, {"child.weight": torch.tensor(5.0)}, torch.ones(()), call)
    results = first.finish().item(), second.finish().item()
    if call is fcall.functional_call:
        assert results == (3, 5)
        assert module.child.weight is own
        assert own_dicts(module)
    else:
        assert results == (5, 2)  # the first found the second's, the second what the first put back
        assert module.child.weight is not own
        assert module.child.weight.item() == 3


# --- plain code that reads, copies or changes the module ----------------------------------------


class Child(nn.Module):
    """Parameters, buffers written both ways, and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.l2 = nn.Linear(4, 2)
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.step + 1
        return self.l2(self.norm(self.l1(x)).tanh()) * self.step


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _deletes(module: nn.Module) -> None:
    del module.l1.weight
    assert not hasattr(module.l1, "weight")


def _registers_again(module: nn.Module) -> None:
    del module.l1.weight
    module.l1.register_parameter("weight", nn.Parameter(torch.ones(4, 3)))


def _steps(module: nn.Module) -> None:
    """As an optimizer does."""
    module(X).sum().backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": _pickled,
    "save": _saved,
    "state_dict": lambda module: module.state_dict(),
    "named_parameters": lambda module: [*module.named_parameters()],
    "named_buffers": lambda module: [*module.named_buffers()],
    "repr": repr,
    "a plain call": lambda module: module(X),
    "to": lambda module: module.to(torch.float64),
    "load_state_dict": lambda module: module.load_state_dict(
        {name: t + 1 for name, t in module.state_dict().items()}
    ),
    "load_state_dict, assigned": lambda module: module.load_state_dict(
        {name: t + 1 for name, t in module.state_dict().items()}, assign=True
    ),
    "register_parameter": lambda module: module.register_parameter(
        "more", nn.Parameter(torch.ones(2))
    ),
    "register_buffer": lambda module: module.l1.register_buffer("more", torch.ones(2)),
    "a module more": lambda module: module.add_module("more", nn.Tanh()),
    "delete": _deletes,
    "delete and register": _registers_again,
    "delete a buffer": lambda module: delattr(module, "step"),
    "set": lambda module: setattr(module.l1, "weight", nn.Parameter(torch.ones(4, 3))),
    "set a buffer": lambda module: setattr(module, "step", torch.tensor(7.0)),
    "set to None": lambda module: setattr(module.l1, "bias", None),
    "an optimizer": _steps,
    "freeze": lambda module: module.requires_grad_(False),
}


def _described(thing: Any) -> Any:
    """Return all that is to be equal, for a tensor, a module or a nest of them."""
    if isinstance(thing, Tensor):
        return type(thing), thing.dtype, thing.requires_grad, thing.tolist()
    if isinstance(thing, nn.Module):
        tensors = [*thing.named_parameters(), *thing.named_buffers()]
        training = [module.training for module in thing.modules()]
        return str(thing), [(name, _described(t)) for name, t in tensors], training
    if isinstance(thing, dict):
        return [(name, _described(t)) for name, t in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [*map(_described, thing)]
    return thing


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_plain_code_during_a_call(operation: Callable[[nn.Module], Any]) -> None:
    """It finds the module as if there were no call, and the call the given values."""
    torch.manual_seed(0)
    module = Pauses(Child())
    twin = copy.deepcopy(module.child)
    values = state_of(module, seed=1)
    given = {name: value.clone() for name, value in values.items()}
    oracle = loaded(module, values)
    with paused(module, given, X) as call:
        done = operation(module.child)
        assert _described(done) == _described(operation(twin))
        assert _described(module.child) == _described(twin)
        if isinstance(done, nn.Module) and operation is not copy.copy:  # which has the same dicts
            assert done is module.child or own_dicts(done)
        assert_close(call.finish(), oracle(X.double()), dtype=torch.float32)
    assert_close(given["child.step"], oracle.child.step)
    assert_close(given["child.norm.running_mean"], oracle.child.norm.running_mean)
    assert _described(module.child) == _described(twin)
    assert own_dicts(module)


def test_cached_parametrizations() -> None:
    """parametrize.cached() holds for all threads: each has its own tensors in it."""
    module = parametrized()
    own = module[0].weight
    value = {"0.parametrizations.weight.original": torch.rand(3, 3)}
    with alive(), fcall.substitute(module, value), parametrize.cached():
        assert not torch.equal(module[0].weight, own)
        assert torch.equal(in_a_thread(lambda: module[0].weight), own)
        with fcall.substitute(module, value):
            pass
        assert not torch.equal(module[0].weight, own)
    assert type(parametrize._cache) is dict
    with parametrize.cached():
        with fcall.substitute(module, value):
            assert not torch.equal(module[0].weight, own)
        assert torch.equal(module[0].weight, own)
    assert type(parametrize._cache) is dict


def test_cached_parametrizations_twice() -> None:
    """What torch has forgotten with its cache is not found in a later one."""
    module = parametrized()
    name = "0.parametrizations.weight.original"
    value = torch.rand(3, 3)

    def read() -> Tensor:
        with parametrize.cached():
            in_a_thread(lambda: fcall.functional_call(module, {name: torch.ones(3, 3)}, X))
            return module[0].weight

    with fcall.substitute(module, {name: value}):
        before = read()
        value.zero_()
        assert read().count_nonzero() == 0
        assert before.count_nonzero() == 9


def test_plain_attributes_of_a_base_class() -> None:
    """Whoever has none of their own finds the class's, whatever others are given."""

    class Base(nn.Module):
        plain = torch.tensor(3.0)

        def forward(self) -> float:
            return self.plain.item()

    class Derived(Base):
        pass

    module, other = Derived(), Derived()
    module.plain = torch.tensor(4.0)
    with fcall.substitute(module, {"plain": torch.tensor(5.0)}):
        assert (module(), in_a_thread(module), other(), in_a_thread(other)) == (5, 4, 3, 3)


# --- backward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [None, "non-reentrant", "reentrant"])
def test_backward_during_a_call(way: str | None) -> None:
    """Also where it computes the forward again, it finds the values of its own call."""
    module = network(way, dropout=0.0)
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    values, leaves = values_for(module)
    expected = expected_gradients(module, values, leaves, x)
    other = {f"child.{name}": p for name, p in values_for(module)[0].items()}
    with unchanged(module):
        out = fcall.functional_call(module, values, (x,))
        with paused(Pauses(module), other, x):
            actual = gradients(lambda: out, [*leaves, x])
    assert_close(actual, expected)


@pytest.mark.parametrize("way", [None, "non-reentrant", "reentrant", "reentrant outside"])
def test_backward_beside_calls(way: str | None) -> None:
    module = network(way, dropout=0.0)
    x = torch.rand(2, 3, dtype=torch.float64)

    def differentiates() -> Callable[[], None]:
        values, leaves = values_for(module)
        inputs = [*leaves, x.clone().requires_grad_()]
        expected = expected_gradients(module, values, leaves, inputs[-1])

        def run() -> None:
            for _ in range(20):
                call = partial(fcall.functional_call, module, values, inputs[-1])
                assert_close(gradients(call, inputs), expected)

        return run

    def calls() -> Callable[[], None]:
        values, _ = values_for(module)
        expected = plain(module, values)(x)
        return lambda: assert_close(fcall.functional_call(module, values, x), expected)

    with unchanged(module), switching():
        run_beside([calls(), calls()], *[differentiates() for _ in range(4)])
    assert own_dicts(module)


# --- a copy of the process ----------------------------------------------------------------------


def _in_a_fork(check: Callable[[], None]) -> None:
    """Run ``check`` in a copy of this process, which has this one thread alone."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.005)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done, "the fork is stuck"
    assert os.waitstatus_to_exitcode(status) == 0


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
ignore_warning = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)
THREE, FIVE = {"child.weight": torch.tensor(3.0)}, {"child.weight": torch.tensor(5.0)}
ONE = torch.ones(())


@forks
@ignore_warning
def test_a_fork_during_a_call_in_another_thread() -> None:
    module = Pauses(Times())

    def check() -> None:
        own = module.child.weight
        assert module(ONE) == 2
        assert fcall.functional_call(module, FIVE, ONE) == 5
        with fcall.substitute(module, FIVE):
            assert module(ONE) == 5
            assert in_a_thread(lambda: fcall.functional_call(module, THREE, ONE)) == 3
        assert module.child.weight is own

    with paused(module, THREE, ONE) as call:
        _in_a_fork(check)
        assert call.finish() == 3


@forks
@ignore_warning
def test_a_fork_in_the_call_itself() -> None:
    """The copy goes on in the call; there, too, it ends with the module as it was."""
    module = Pauses(Times())
    own = module.child.weight
    with alive():
        _in_a_fork(lambda: None)

        def check() -> None:
            assert module.child.weight == 3
            assert fcall.functional_call(module, FIVE, ONE) == 5

        assert fcall.functional_call(module, THREE, (ONE, lambda: _in_a_fork(check))) == 3
    assert module.child.weight is own
    assert own_dicts(module)


@forks
@ignore_warning
def test_a_fork_while_another_thread_changes_modules() -> None:
    """The copy does not wait for a thread that it does not have."""
    module = Pauses(Times())
    held, on = threading.Event(), threading.Event()

    def hold() -> None:
        with scoped.scope._lock:
            held.set()
            assert on.wait(SECONDS)

    def fork() -> None:
        assert held.wait(SECONDS)
        try:
            _in_a_fork(lambda: check_calls(module))
        finally:
            on.set()

    run_beside([], hold, fork)


def check_calls(module: nn.Module) -> None:
    with fcall.substitute(module, FIVE):  # takes the lock, as calls do where others may look
        assert module(ONE) == 5
    assert module(ONE) == 2


# --- a Python without a lock of its own ---------------------------------------------------------


@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(), reason="needs a free-threaded Python"
)
def test_without_a_global_lock() -> None:
    module = MLP()

    def calls(seed: int) -> Callable[[], None]:
        values = state_of(module, seed=seed)
        expected = loaded(module, values)(X.double())

        def run() -> None:
            for _ in range(500):
                out = fcall.functional_call(module, values, (X,))
                assert_close(out, expected, dtype=torch.float32)

        return run

    with unchanged(module):
        run_beside([lambda: module(X)], *[calls(seed) for seed in range(8)])
    assert own_dicts(module)


# --- threads that never look --------------------------------------------------------------------


class TMonitor(threading.Thread):
    """As tqdm's, which lives on after the first bar."""

    __module__ = "tqdm._monitor"


@pytest.mark.parametrize("kind", [TMonitor, threading.Thread])
def test_a_bystander_does_not_slow_calls_down(kind: type[threading.Thread]) -> None:
    """Only where others may look do values stand beside the module's own."""
    stores = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            stores.append(type(self._parameters))
            return super().forward(x)

    module, end = Looks(3, 2), threading.Event()
    other = kind(target=end.wait)
    other.start()
    both = [threading.current_thread(), other]  # and none of the test runner's
    with mock.patch.object(threading, "enumerate", return_value=both):
        fcall.functional_call(module, {"weight": torch.ones(2, 3)}, torch.ones(1, 3))
    end.set()
    other.join()
    assert (stores == [dict]) == (kind is TMonitor)
