"""Ten thousand calls leave nothing behind: no memory, no tensors, no entries in caches."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import MLP, Counter, Recurrent, Shared, parametrized
from compile_tests.support.oracle import state_of
from fcall import plan

CALLS = 10_000
X = torch.rand(1, 3)


def containers() -> dict[str, int]:
    """Return the sizes of all dicts, lists, sets and function caches that fcall's modules keep."""
    sizes = {}
    for info in pkgutil.walk_packages(fcall.__path__, "fcall."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if isinstance(value, (dict, list, set)) and not name.startswith("__"):
                sizes[f"{info.name}.{name}"] = len(value)
            elif hasattr(value, "cache_info"):
                sizes[f"{info.name}.{name}"] = value.cache_info().currsize
    return sizes


def tensors() -> int:
    """Return the number of tensors that live."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def growth(call: Callable[[], Any], times: int = CALLS) -> tuple[int, int, dict[str, int]]:
    """Return by how much calls grow: bytes of Python's memory, tensors, containers of fcall."""
    for _ in range(50):
        call()
    gc.collect()
    tracemalloc.start()
    try:
        call()
        before = tensors(), containers()
        gc.collect()
        memory = tracemalloc.get_traced_memory()[0]
        for _ in range(times):
            call()
        gc.collect()
        more = tracemalloc.get_traced_memory()[0] - memory
        now = tensors(), containers()
    finally:
        tracemalloc.stop()
    sizes = {name: size - before[1].get(name, 0) for name, size in now[1].items()}
    return more, now[0] - before[0], {name: size for name, size in sizes.items() if size > 0}


def check(call: Callable[[], Any], times: int = CALLS, *, slack: int = 16_000) -> None:
    """Check that calls leave nothing; ``slack`` is what they may take once, in bytes."""
    memory, count, sizes = growth(call, times)
    assert memory < slack + times, f"{memory / times:.1f} bytes a call"  # an object takes 16
    assert count <= 0
    assert sizes == {}


def test_the_check_itself() -> None:
    kept: list[Any] = []
    with pytest.raises(AssertionError, match="bytes a call"):
        check(lambda: kept.append(object()), times=2000)
    kept.clear()
    with pytest.raises(AssertionError, match=r"\b5 <= 0"):
        check(lambda: kept.append(torch.ones(())), times=5)


def test_fresh_dicts() -> None:
    module = MLP()
    weights = state_of(module)
    check(lambda: fcall.functional_call(module, {n: w + 0 for n, w in weights.items()}, X))


def test_fresh_modules() -> None:
    value = {"weight": torch.rand(2, 3)}
    check(lambda: fcall.functional_call(nn.Linear(3, 2), value, X), slack=60_000)


def test_fresh_modules_in_a_cycle() -> None:
    """They live until they are collected; nothing of fcall's holds them then."""

    def call() -> None:
        module = nn.Linear(3, 2)
        object.__setattr__(module, "itself", module)
        fcall.functional_call(module, {"bias": torch.zeros(2)}, X)

    # A dict stays as large as it was when the most of them were waiting for the collector.
    check(call, times=5000, slack=60_000)


def test_fresh_names() -> None:
    """The plans of a module are bounded, whatever is asked."""
    module = MLP()
    numbers = iter(range(10**9))
    check(lambda: fcall.functional_call(module, {f"name{next(numbers)}": X}, X), times=500)
    subsets = [[n for i, n in enumerate(state_of(module)) if bits >> i & 1] for bits in range(16)]
    weights = state_of(module)
    for names in subsets * 2:
        for strict in (False, True):
            for ties in (False, True):
                if not strict or len(names) == len(weights):
                    given = {name: weights[name] for name in names}
                    fcall.functional_call(module, given, X, strict=strict, tie_weights=ties)
    assert len(plan._plans_of(module)) <= plan.PLANS_PER_MODULE


def test_a_structure_that_changes_with_each_call() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def call() -> None:
        module[0] = nn.Linear(3, 3)
        fcall.functional_call(module, {"0.bias": torch.zeros(3)}, X)

    check(call, times=500)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "reassigns": (Counter, X),
    "an RNN": (Recurrent, torch.rand(1, 2, 3)),
    "two paths": (Shared, X),
    "parametrized": (parametrized, X),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("way", ["call", "block"])
def test_other_modules(name: str, way: str) -> None:
    make, x = MODULES[name]
    module = make()
    weights = state_of(module)

    def call() -> None:
        values = dict(weights)
        if way == "call":
            fcall.functional_call(module, values, x)
        else:
            with fcall.substitute(module, values):
                module(x)

    check(call, times=500)


def test_calls_that_fail() -> None:
    class Fails(MLP):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            raise ValueError

    module, weights = Fails(), state_of(MLP())

    def call() -> None:
        for given in (weights, {"l3.bias": X}, {1: X}, {"l1.bias": None}):
            try:
                fcall.functional_call(module, given, X)
            except (ValueError, AttributeError, KeyError, TypeError):
                pass
            else:
                raise AssertionError

    check(call, times=500)


def test_gradients() -> None:
    module = MLP()
    weights = {name: value.requires_grad_() for name, value in state_of(module).items()}

    def call() -> None:
        out = fcall.functional_call(module, weights, X)
        torch.autograd.grad(out.sum(), list(weights.values()))

    check(call, times=500)


# --- what is given is let go at once ------------------------------------------------------------


@pytest.fixture
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _fails(*_: Any) -> None:
    raise ValueError


def _use(way: str, module: nn.Module, values: dict[str, Tensor], x: Tensor) -> None:
    if way == "block":
        with fcall.substitute(module, values):
            module(x)
    else:
        fcall.functional_call(module, values, x, method="forward" if way == "method" else None)


@pytest.mark.usefixtures("_without_gc")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", ["call", "block", "method"])
def test_all_is_freed_with_the_last_reference(way: str, fails: bool) -> None:
    module = MLP()
    if fails:
        module.l2.register_forward_hook(_fails)
    values, x = state_of(module), torch.rand(1, 3)
    references = [weakref.ref(thing) for thing in (x, *values.values())]
    more = [weakref.ref(thing) for thing in (*module.modules(), *module.parameters())]

    try:
        _use(way, module, values, x)
    except ValueError:
        assert fails
    values.clear()
    del x
    assert [reference() for reference in references] == [None] * len(references)
    del module
    assert [reference() for reference in more] == [None] * len(more)


def test_the_result_keeps_the_values_but_not_the_module() -> None:
    module = MLP()
    values = {name: value.requires_grad_() for name, value in state_of(module).items()}
    out = fcall.functional_call(module, values, X)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    out.sum().backward()
    assert all(value.grad is not None for value in values.values())


@pytest.mark.compiled
def test_a_compiled_module_is_freed() -> None:
    """With the callable, and what torch keeps of it."""
    module = MLP()
    f = fcall.compile(module, backend="eager")
    values = state_of(module)
    f(values, X)
    references = [weakref.ref(thing) for thing in (module, values["l1.bias"])]
    del module, f, values
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_no_reference_is_counted_twice() -> None:
    """What C code that is called wrongly would do."""
    module = MLP()
    values = state_of(module)
    given = list(values.values())
    before = [sys.getrefcount(value) for value in given]
    for _ in range(100):
        fcall.functional_call(module, values, X)
    assert [sys.getrefcount(value) for value in given] == before
