"""A mistake in a compiled call raises what it raises eagerly, to the letter."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import MLP, Attention, Counter, Shared, Tied
from compile_tests.support.oracle import assert_close, state_of, unchanged
from fcall import errors

pytestmark = pytest.mark.compiled

call = fcall.functional_call


class Mistake(NamedTuple):
    error: type[Exception]
    builtin: type[Exception]
    make: Callable[[], nn.Module]
    give: Callable[[dict[str, Tensor]], Any]
    """Makes, of all values of the module, those to be given."""
    options: dict[str, Any] = {}  # noqa: RUF012
    x: Tensor = torch.rand(2, 3)


class ReadOnly(MLP):
    @property
    def first(self) -> Tensor:
        return self.l1.bias


def without(p: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in p.items() if name not in names}


TOKENS = torch.arange(5)

MISTAKES = {
    "tied names": Mistake(
        errors.TiedValuesError,
        ValueError,
        Tied,
        lambda p: {**p, "out.weight": p["embed.weight"] * 2},
        x=TOKENS,
    ),
    "shared submodule": Mistake(
        errors.TiedValuesError,
        ValueError,
        Shared,
        lambda p: {"first.weight": p["first.weight"], "second.weight": p["first.weight"] * 2},
    ),
    "shared submodule, untied": Mistake(
        errors.SharedSlotError,
        ValueError,
        Shared,
        lambda p: {"first.weight": p["first.weight"], "second.weight": p["first.weight"] * 2},
        {"tie_weights": False},
    ),
    "strict, missing": Mistake(
        errors.StrictKeysError,
        RuntimeError,
        MLP,
        lambda p: without(p, "l1.bias", "l2.bias"),
        {"strict": True},
    ),
    "strict, unexpected": Mistake(
        errors.StrictKeysError,
        RuntimeError,
        MLP,
        lambda p: {**p, "l1.wieght": p["l1.weight"], "l3": p["l1.bias"]},
        {"strict": True},
    ),
    "strict, both": Mistake(
        errors.StrictKeysError,
        RuntimeError,
        Attention,
        lambda p: {**without(p, "qkv.bias"), "qvk.bias": p["qkv.bias"]},
        {"strict": True},
        torch.rand(2, 3, 8),
    ),
    "strict, untied": Mistake(
        errors.StrictKeysError,
        RuntimeError,
        Tied,
        lambda p: without(p, "out.weight"),
        {"strict": True, "tie_weights": False},
        TOKENS,
    ),
    "a name in two dicts": Mistake(
        errors.DuplicateNameError, ValueError, MLP, lambda p: [p, {"l1.bias": p["l1.bias"]}]
    ),
    "no dict": Mistake(errors.InvalidDictsError, ValueError, MLP, lambda p: p["l1.bias"]),
    "None for a dict": Mistake(errors.InvalidDictsError, ValueError, MLP, lambda p: None),
    "a list of pairs": Mistake(
        errors.InvalidDictsError, ValueError, MLP, lambda p: list(p.items())
    ),
    "a string": Mistake(errors.InvalidDictsError, ValueError, MLP, lambda p: "l1.bias"),
    "no name": Mistake(errors.InvalidNameError, KeyError, MLP, lambda p: {**p, "": p["l1.bias"]}),
    "an empty part": Mistake(
        errors.InvalidNameError, KeyError, MLP, lambda p: {"l1..bias": p["l1.bias"]}
    ),
    "a number for a name": Mistake(
        errors.InvalidNameError, KeyError, MLP, lambda p: {0: p["l1.bias"]}
    ),
    "a number for a tensor": Mistake(
        errors.NotATensorError, TypeError, MLP, lambda p: {**p, "l2.bias": 1.0}
    ),
    "None for a tensor": Mistake(
        errors.NotATensorError, TypeError, MLP, lambda p: {**p, "l2.bias": None}
    ),
    "the name of a submodule": Mistake(
        errors.NotATensorSlotError, TypeError, MLP, lambda p: {"l1": p["l1.bias"]}
    ),
    "unknown path": Mistake(
        errors.UnknownPathError, AttributeError, MLP, lambda p: {"l3.bias": p["l1.bias"]}
    ),
    "path through a tensor": Mistake(
        errors.PathThroughValueError, TypeError, MLP, lambda p: {"l1.bias.data": p["l1.bias"]}
    ),
    "a property": Mistake(
        errors.ReadOnlyAttributeError, AttributeError, ReadOnly, lambda p: {"first": p["l1.bias"]}
    ),
    "a lazy module": Mistake(
        errors.LazyModuleError,
        RuntimeError,
        lambda: nn.Sequential(nn.LazyLinear(2)),
        lambda p: {"0.weight": torch.rand(2, 3), "0.bias": torch.rand(2)},
    ),
    "unknown method": Mistake(
        errors.UnknownMethodError, AttributeError, MLP, lambda p: p, {"method": "encod"}
    ),
    "a tensor on meta": Mistake(
        errors.MetaTensorError,
        RuntimeError,
        lambda: MLP().to("meta"),
        lambda p: {"l1.weight": torch.rand(4, 3), "l1.bias": torch.rand(4)},
    ),
    "no module": Mistake(errors.NotAModuleError, TypeError, lambda: torch.tanh, lambda p: {}),
    "nn.DataParallel": Mistake(
        errors.UnsupportedModuleError,
        RuntimeError,
        lambda: nn.DataParallel(MLP()),
        lambda p: p,
    ),
}


WITH_STATE = MISTAKES.keys() - {"no module", "a lazy module", "a tensor on meta"}


def raised(fn: Callable[..., Any], *args: Any) -> tuple[Exception, str]:
    """Return what ``fn`` raises, and its message."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fn(*args)
    return caught.value, str(caught.value)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, fullgraph: bool) -> None:
    error, builtin, make, give, options, x = MISTAKES[name]
    module = make()
    p = give(state_of(module) if name in WITH_STATE else {})

    def fn(p: Any, x: Tensor) -> Any:
        return call(module, p, x, **options)

    torch._dynamo.reset()
    expected, message = raised(fn, p, x)
    compiled, compiled_message = raised(
        torch.compile(fn, backend="eager", fullgraph=fullgraph), p, x
    )
    assert type(expected) is error
    for e in (expected, compiled, pickle.loads(pickle.dumps(compiled))):
        assert isinstance(e, error)
        assert isinstance(e, builtin)
        assert type(e).__name__ == error.__name__
        assert type(e).__module__ == error.__module__
    assert compiled_message == message == str(pickle.loads(pickle.dumps(compiled)))


TYPICAL = ("tied names", "strict, both", "unknown path", "a number for a tensor", "no name")


def step(name: str) -> tuple[nn.Module, Callable[..., Any], Any, dict[str, Tensor], Tensor]:
    """Return a module, a training step, wrong weights, right ones, and the input."""
    _, _, make, give, options, x = MISTAKES[name]
    module = make()

    def gradients(p: Any, x: Tensor) -> Any:
        return torch.func.grad(lambda p: call(module, p, x, **options).square().sum())(p)

    right = state_of(module, seed=1)
    return module, gradients, give(right), right, x


@pytest.mark.parametrize("name", [n for n in TYPICAL if n != "a number for a tensor"])
def test_mistakes_in_a_transform(name: str) -> None:
    module, fn, wrong, right, x = step(name)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    with unchanged(module):
        expected, message = raised(fn, wrong, x)
        error, compiled_message = raised(compiled, wrong, x)
    assert isinstance(error, type(expected))
    assert compiled_message == message
    assert_close(compiled(right, x), fn(right, x))


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", TYPICAL)
def test_a_right_call_works_before_and_after(name: str, fullgraph: bool) -> None:
    error, _, make, give, options, x = MISTAKES[name]
    module = make()
    right = state_of(module, seed=1)
    torch._dynamo.reset()
    fn = torch.compile(
        lambda p, x: call(module, p, x, **options), backend="aot_eager", fullgraph=fullgraph
    )
    with unchanged(module):
        for _ in range(2):
            assert_close(fn(right, x), call(module, right, x))
            with pytest.raises(error):
                fn(give(right), x)
        assert_close(fn(right, x), call(module, right, x))


def test_values_computed_in_the_trace() -> None:
    def fn(p: dict[str, Tensor]) -> Tensor:
        return call(module, {**p, "out.weight": p["embed.weight"] + 1}, TOKENS)

    module = Tied()
    p = {"embed.weight": torch.rand(7, 4)}
    torch._dynamo.reset()
    expected, message = raised(fn, p)
    error, compiled_message = raised(torch.compile(fn, backend="eager", fullgraph=True), p)
    assert isinstance(error, type(expected))
    assert compiled_message == message


def test_a_module_that_went_to_meta() -> None:
    module, x = MLP(), torch.rand(2, 3)
    p = {name: value for name, value in state_of(module, seed=1).items() if "l1" in name}
    torch._dynamo.reset()
    fn = torch.compile(lambda p, x: call(module, p, x), backend="eager", fullgraph=True)
    fn(p, x)
    module.to("meta")
    _, message = raised(call, module, p, x)
    with pytest.raises(errors.MetaTensorError, match=re.escape(message)):
        fn(p, x)


class CallsWrongly(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return call(self.l1, {"wieght": x}, x, strict=True)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_mistake_inside_of_a_module(fullgraph: bool) -> None:
    def fn(p: Any, x: Tensor) -> Tensor:
        return call(module, p, x)

    module, x = CallsWrongly(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    torch._dynamo.reset()
    with unchanged(module):
        _, message = raised(fn, p, x)
        error, compiled_message = raised(
            torch.compile(fn, backend="eager", fullgraph=fullgraph), p, x
        )
    assert isinstance(error, errors.StrictKeysError)
    assert compiled_message == message


class Raises(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.encode(x)
        if x.shape[0] == 2:
            raise LookupError("no batch of two")
        return self.l2(hidden) * scale


def test_the_module_s_own_exception() -> None:
    module = Raises()
    p = state_of(module, seed=1)
    torch._dynamo.reset()
    fn = torch.compile(lambda p, x: call(module, p, x), backend="eager")
    with unchanged(module):
        with pytest.raises(LookupError, match="no batch of two"):
            fn(p, torch.rand(2, 3))
        x = torch.rand(4, 3)
        assert_close(fn(p, x), call(module, p, x))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_read_only_mapping(fullgraph: bool) -> None:
    def fn(p: Any, x: Tensor) -> Tensor:
        return call(module, p, x)

    module, p = Counter(), MappingProxyType({"foo": torch.zeros(())})
    torch._dynamo.reset()
    with unchanged(module):
        expected, message = raised(fn, p, torch.ones(2))
        error, compiled_message = raised(
            torch.compile(fn, backend="eager", fullgraph=fullgraph), p, torch.ones(2)
        )
    assert type(expected) is errors.ReadOnlyMappingError
    assert isinstance(error, errors.ReadOnlyMappingError)
    assert compiled_message == message


def test_the_setting_that_lets_rnns_in_is_put_back() -> None:
    module = Tied()
    fn = torch.compile(lambda p, x: call(module, p, x), backend="eager", fullgraph=True)
    with pytest.raises(errors.UnknownPathError):
        fn({"nothing.weight": torch.rand(1)}, TOKENS)
    assert torch._dynamo.config.allow_rnn is False
