"""Compiled modules and compiled calls while eager calls are under way in other threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.threads import Pauses, alive, alone, paused, run_beside, switching
from compile_tests.test_threads_around import own_dicts

pytestmark = pytest.mark.compiled

X = torch.rand(2, 3)
ROUNDS = 10  # more than the 8 times that Dynamo compiles a function anew

no_graph = pytest.mark.xfail(
    strict=torch.__version__.startswith("2.13"),  # others can do some of it
    reason="Dynamo cannot trace what stands in for a module's dicts, or does so each time anew",
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("where", ["child", "all"])
def test_compiled_modules(where: str) -> None:
    """What is compiled was so before; each thread finds its values in it."""
    inner = MLP().double()
    compiled = torch.compile(inner, backend="eager")
    module = nn.Sequential(nn.Tanh(), compiled) if where == "child" else compiled
    prefix = "1._orig_mod." if where == "child" else ""
    x = torch.rand(2, 3, dtype=torch.float64)
    args = (x.tanh() if where == "child" else x,)

    def calls(seed: int) -> Callable[[], None]:
        values = state_of(inner, seed=seed)
        given = {prefix + name: value for name, value in values.items()}
        expected = loaded(inner, values)(*args)

        def run() -> None:
            for _ in range(20):
                assert_close(fcall.functional_call(module, given, (x,)), expected)

        return run

    with unchanged(module), switching():
        own = module(x)
        callers = [calls(seed) for seed in range(8)]
        run_beside([lambda: assert_close(module(x), own)], *callers)
    assert own_dicts(inner)


@pytest.mark.parametrize("before", [False, True], ids=["cold", "compiled before"])
@pytest.mark.parametrize("many", [pytest.param(True, marks=no_graph), False], ids=["two", "one"])
def test_a_compiled_child_is_one_graph(many: bool, before: bool) -> None:
    """Whether another thread lives or not."""
    inner = MLP()
    module = nn.Sequential(torch.compile(inner, backend="eager", fullgraph=True))
    if before:
        module(X)
    with alive() if many else alone():
        for seed in range(ROUNDS):
            own = state_of(inner, seed=seed)
            values = {f"0._orig_mod.{name}": value for name, value in own.items()}
            out = fcall.functional_call(module, values, X)
            assert_close(out, loaded(inner, own)(X.double()), dtype=torch.float32)


def _functional(module: nn.Module) -> Callable[..., Tensor]:
    call = fcall.functional_call
    return torch.compile(lambda p, x: call(module, p, x), backend="eager", fullgraph=True)  # type: ignore[no-any-return]


def _ahead(module: nn.Module) -> Callable[..., Tensor]:
    return fcall.compile(module, backend="eager")  # type: ignore[no-any-return]


@no_graph
@pytest.mark.parametrize("before", [False, True], ids=["cold", "compiled before"])
@pytest.mark.parametrize(
    "compiled", [_functional, _ahead], ids=["functional_call", "fcall.compile"]
)
@pytest.mark.parametrize("names", [["l1.weight"], None], ids=["some names", "all"])
def test_a_compiled_call_during_a_call(names: Any, compiled: Any, before: bool) -> None:
    module = Pauses(MLP())
    f, values = compiled(module.child), state_of(module.child, seed=1)
    given = {name: values[name] for name in names or values}
    expected = loaded(module.child, given)(X.double())
    if before:
        f(given, X)
    for seed in range(ROUNDS):
        with paused(module, state_of(module, seed=seed), X):
            assert_close(f(given, X), expected, dtype=torch.float32)


@no_graph
@pytest.mark.parametrize("before", [False, True], ids=["cold", "compiled before"])
def test_a_compiled_module_during_a_call(before: bool) -> None:
    """Called plainly: it has nothing to do with the call."""
    module = Pauses(MLP())
    compiled = torch.compile(module.child, backend="eager", fullgraph=True)
    expected = module.child(X)
    if before:
        compiled(X)
    for seed in range(ROUNDS):
        with paused(module, state_of(module, seed=seed), X):
            assert_close(compiled(X), expected)


def test_an_export_during_a_call() -> None:
    module = Pauses(MLP())
    values = state_of(module.child, seed=1)
    with paused(module, state_of(module, seed=2), X):
        program = fcall.export(module.child, values, (X,))
        own = torch.export.export(module.child, (X,))
    assert_close(own.module()(X), module.child(X))
    out = program.module()(values, X)
    assert_close(out, loaded(module.child, values)(X.double()), dtype=torch.float32)
