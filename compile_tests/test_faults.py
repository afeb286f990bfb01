"""A fault at any point of a call leaves the module as it was, and the next call right."""

from __future__ import annotations

import contextlib
import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall
from compile_tests.support import faults
from compile_tests.support.models import MLP, Counter, Recurrent, Shared, Tied, parametrized
from compile_tests.support.oracle import assert_close, fingerprint, loaded, state_of, unchanged
from compile_tests.support.random_modules import WIDTH, Plain, Rebuilt
from fcall import scoped

Case = tuple[nn.Module, dict[str, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _a_lock_that_is_free() -> Iterator[None]:
    """A tracer may raise between the body of a ``with lock`` and its release; no interrupt can."""
    yield
    scoped.scope._forget_lock()


def _whole(module: nn.Module, x: Tensor) -> Case:
    return module, state_of(module, seed=1), x


CASES: dict[str, Callable[[], Case]] = {
    "MLP": lambda: _whole(MLP(), torch.rand(2, 3)),
    "reassigns a buffer": lambda: _whole(Counter(), torch.rand(2)),
    "deletes and registers again": lambda: _whole(Rebuilt(), torch.rand(2, WIDTH)),
    "ties": lambda: (Tied(), {"out.weight": torch.rand(7, 4)}, torch.arange(3)),
    "two paths": lambda: _whole(Shared(), torch.rand(2, 3)),
    "an RNN": lambda: _whole(Recurrent(), torch.rand(1, 2, 3)),
    "a bypass": lambda: (parametrized(), {"0.weight": torch.rand(3, 3)}, torch.rand(2, 3)),
    "an attribute": lambda: (Plain(), {"plain": torch.rand(WIDTH)}, torch.rand(2, WIDTH)),
}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def _by_call(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
    return fcall.functional_call(module, values, x)


def _in_a_block(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
    with fcall.substitute(module, values):
        return module(x)


def marks_of(module: nn.Module) -> list[Any]:
    """Return what must stay as it is: also the tensors in plain attributes."""
    attributes = [vars(owner) for owner in module.modules()]
    plain = [(k, id(v)) for held in attributes for k, v in held.items() if isinstance(v, Tensor)]
    return [*fingerprint(module), plain]


def _damaging(
    make: Callable[[], Case], call: Any, *, warm: bool = True, **options: Any
) -> list[str]:
    """Return the points at which a fault leaves the module changed or the next call wrong."""
    now: dict[str, Any] = {}

    def prepare() -> Callable[[], Any]:
        module, values, x = make()
        twin = copy.deepcopy(module)
        if warm:  # the plan of the call is kept
            call(module, dict(values), x)
        now.update(module=module, values=values, x=x, twin=twin, before=marks_of(module))
        return lambda: call(module, dict(values), x)

    bad, count = [], 0
    for where in faults.points(prepare, **options):
        count += 1
        same = marks_of(now["module"]) == now["before"]
        again = [call(now[m], dict(now["values"]), now["x"]) for m in ("module", "twin")]
        if not same:
            bad.append(where)
        elif not torch.equal(*again):
            bad.append(f"{where}: the next call is wrong")
    assert count > 20, "there was nothing to interrupt"
    return list(dict.fromkeys(bad))


@cases
@pytest.mark.parametrize("event", ["line", "opcode"])
def test_a_fault_in_a_call(make: Callable[[], Case], event: str) -> None:
    assert _damaging(make, _by_call, event=event) == []


@cases
def test_a_fault_while_another_thread_lives(make: Callable[[], Case]) -> None:
    """Then values stand beside the module's own."""
    end = threading.Event()
    threading.Thread(target=end.wait).start()
    try:
        assert _damaging(make, _by_call, step=2) == []
    finally:
        end.set()


@cases
def test_a_fault_while_names_are_resolved(make: Callable[[], Case]) -> None:
    def resolve(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
        with contextlib.suppress(fcall.errors.StrictKeysError):
            fcall.functional_call(module, {**values, "unknown": x}, x, strict=True)
        return fcall.functional_call(module, values, x) if not sys.gettrace() else None

    assert _damaging(make, resolve, warm=False, step=7) == []


@cases
def test_a_fault_in_a_block(make: Callable[[], Case]) -> None:
    """But for the first line of the block's ``__exit__``: before it nothing can be caught."""
    first = fcall.substitute.__exit__.__code__.co_firstlineno
    lines = [f"substitute.py:{first + i} in" for i in range(8)]
    bad = _damaging(make, _in_a_block, event="line")
    assert [where for where in bad if not where.startswith(tuple(lines))] == []


@cases
def test_the_cache_of_parametrizations_after_a_fault(make: Callable[[], Case]) -> None:
    caches = []

    def call(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
        with parametrize.cached():
            cache = parametrize._cache
            try:
                return _by_call(module, values, x)
            finally:
                caches.append(parametrize._cache is cache)

    with contextlib.suppress(AssertionError):  # what the module is like, other tests tell
        _damaging(make, call, step=3)
    assert all(caches)


def test_faults_leave_nothing_behind() -> None:
    """Neither a call in force, nor a plan that is wrong, nor a recorder of routes."""
    module, values, x = CASES["MLP"]()
    twin, other = loaded(module, values), MLP()
    with fcall.record_routes() as routes:
        before = len(routes)
        for _ in faults.points(lambda: lambda: _by_call(other, values, x), step=11):
            out = _by_call(module, values, x)
            assert_close(out, twin(x.double()))
        assert len(routes) > before
    assert fcall.functional_call(module, {}, x).shape == out.shape


# --- a real signal ------------------------------------------------------------------------------


def _interrupted(prepare: Callable[[], Any], call: Callable[[], Any], times: int) -> None:
    """Call again and again, each time until a signal's handler raises out of it."""

    def handler(*_: Any) -> None:
        raise faults.Fault

    # Of the process's own time: the wall clock's signal is pytest-timeout's.
    before = signal.signal(signal.SIGVTALRM, handler)
    try:
        for i in range(times):
            prepare()
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 1e-4 + 1e-5 * (i % 37))
                end = time.process_time() + 1  # if something swallows what the handler raises
                while time.process_time() < end:
                    call()
            except faults.Fault:
                pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_signal() -> None:
    module, values, x = CASES["MLP"]()
    before, changed = marks_of(module), 0
    own = [(owner, key, tensor) for owner in module.modules() for key, tensor in _own(owner)]

    def look() -> None:
        nonlocal changed
        changed += marks_of(module) != before
        for owner, key, tensor in own:
            owner._parameters[key] = tensor

    _interrupted(look, lambda: _by_call(module, values, x), times=200)
    look()
    assert changed == 0


def _own(owner: nn.Module) -> list[tuple[str, Any]]:
    return list(owner._parameters.items())


# --- a dict that refuses ------------------------------------------------------------------------


class Refuses(dict[str, Any]):
    """Raises at one of its writes, as when there is no memory for it."""

    left = -1

    def __setitem__(self, key: str, value: Any) -> None:
        self.left -= 1
        if self.left == -1:
            raise MemoryError
        super().__setitem__(key, value)


@pytest.mark.parametrize("number", range(4))
def test_a_write_that_fails(number: int) -> None:
    """The first two writes put in, the next two put back."""
    module, values, x = nn.Linear(3, 2), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, 0.0
    module._parameters = Refuses(module._parameters)
    x = torch.rand(1, 3)
    with unchanged(module):
        module._parameters.left = number
        with pytest.raises(MemoryError):
            fcall.functional_call(module, values, x)
        module._parameters.left = -1
    assert_close(fcall.functional_call(module, values, x), loaded(module, values)(x.double()))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
@pytest.mark.parametrize("call", [_by_call, _in_a_block])
@cases
def test_an_exception_in_the_module(
    make: Callable[[], Case], call: Any, error: type[BaseException]
) -> None:
    module, values, x = make()
    parts = [m for m in module.modules() if not isinstance(m, parametrize.ParametrizationList)]

    def fail(*_: Any) -> None:
        raise error

    for part in parts:
        handle = part.register_forward_hook(fail)
        before = marks_of(module)
        # A container is not called, nor is what a bypass stands for.
        with contextlib.suppress(error):
            call(module, dict(values), x)
        assert marks_of(module) == before
        handle.remove()
