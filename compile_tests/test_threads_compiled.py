"""Compiled modules and compiled calls while eager calls are under way in other threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fcall
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.threads import Pauses, alive, alone, paused, run_beside, switching
from compile_tests.test_threads_around import own_dicts

pytestmark = pytest.mark.compiled

X = torch.rand(2, 3)
ROUNDS = 10  # more than the 8 times that Dynamo compiles a function anew


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

        def plainly() -> None:
            try:
                out = module(x)
            except AssertionError as error:  # of Dynamo's; see docs/semantics.md
                assert "Guard" in str(error)  # noqa: PT017
            else:
                assert_close(out, own)

        callers = [calls(seed) for seed in range(8)]
        run_beside([plainly], *callers)
    assert own_dicts(inner)


def _whole(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager", fullgraph=True)  # type: ignore[return-value]


def _in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager", fullgraph=True)
    return module


class CallsAFunction(nn.Module):
    """Its forward is a compiled function that is no module, and reads one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.function = torch.compile(lambda x: module(x), backend="eager")

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("before", [False, True], ids=["cold", "compiled before"])
@pytest.mark.parametrize("many", [True, False], ids=["two", "one"])
@pytest.mark.parametrize(
    ("compiled", "prefix"),
    [(_whole, "0._orig_mod."), (_in_place, "0."), (CallsAFunction, "0.module.")],
    ids=["torch.compile", "compile()", "function"],
)
def test_a_compiled_child(compiled: Any, prefix: str, many: bool, before: bool) -> None:
    """Whether another thread lives or not; if so, it runs uncompiled."""
    inner = MLP()
    reference = copy.deepcopy(inner)
    module = nn.Sequential(compiled(inner))
    if before:
        module(X)
    with alive() if many else alone():
        for seed in range(ROUNDS):
            own = state_of(reference, seed=seed)
            values = {prefix + name: value for name, value in own.items()}
            with unchanged(inner):
                out = fcall.functional_call(module, values, X)
            assert_close(out, loaded(reference, own)(X.double()), dtype=torch.float32)


def test_a_compiled_child_without_values_stays_compiled() -> None:
    compilations = CompileCounter()
    first, second = nn.Linear(3, 3), MLP()
    module = nn.Sequential(first, torch.compile(second, backend=compilations, fullgraph=True))
    with alive():
        for seed in range(ROUNDS):
            own = state_of(first, seed=seed)
            values = {f"0.{name}": value for name, value in own.items()}
            out = fcall.functional_call(module, values, X)
            expected = copy.deepcopy(second).double()(loaded(first, own)(X.double()))
            assert_close(out, expected, dtype=torch.float32)
    assert compilations.frame_count == 1


@pytest.mark.parametrize("known", [False, True], ids=["cold", "compiled before"])
def test_what_is_compiled_during_a_call_is_not_for_those_in_it(known: bool) -> None:
    """A function that was compiled on what others see of the module, while values stood there."""
    module = CallsAFunction(MLP())
    frozen = copy.deepcopy(module.module).requires_grad_(False)
    values = state_of(frozen, seed=1)  # need no gradients, where the module's own do
    given = {f"module.{name}": value.detach() for name, value in values.items()}
    own = module(X) if known else loaded(module.module, {})(X.double())
    pauses = Pauses(module)
    inside = {f"child.{name}": value for name, value in given.items()}
    with paused(pauses, inside, X) as call:
        for _ in range(3):
            out = module(X)
            assert_close(out, own, dtype=torch.float32)
            assert out.requires_grad
        out = call.finish()
    assert_close(out, loaded(frozen, values)(X.double()), dtype=torch.float32)
    assert not out.requires_grad


def _functional(module: nn.Module) -> Callable[..., Tensor]:
    call = fcall.functional_call
    return torch.compile(lambda p, x: call(module, p, x), backend="eager", fullgraph=True)  # type: ignore[no-any-return]


def _ahead(module: nn.Module) -> Callable[..., Tensor]:
    return fcall.compile(module, backend="eager")  # type: ignore[no-any-return]


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


def test_a_call_compiled_ahead_during_a_call_is_not_for_those_in_it() -> None:
    module = MLP()
    f = fcall.compile(module, backend="eager")
    given = {"l1.weight": torch.rand(4, 3)}

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Any:
            return f(given, x)

    outer = Calls()
    frozen = {name: v for name, v in state_of(outer, seed=1).items() if "l2" in name}
    pauses = Pauses(outer)
    with paused(pauses, {f"child.{name}": v for name, v in frozen.items()}, X) as call:
        expected = loaded(module, given)(X.double())
        for _ in range(3):  # compiled on dicts in which the other thread sees its values
            assert_close(f(given, X), expected, dtype=torch.float32)
        out = call.finish()
    own = {name.removeprefix("inner."): value for name, value in frozen.items()}
    expected = loaded(module, {**given, **own})(X.double())
    assert_close(out, expected, dtype=torch.float32)
    assert out.requires_grad  # l1.bias is the module's own
