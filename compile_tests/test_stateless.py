"""The deprecated name, beside torch's: results, write-back, errors, and the warning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import check_compiled
from compile_tests.support.models import EXAMPLES, MLP, Counter, Tied
from compile_tests.support.oracle import assert_close, state_of, unchanged
from fcall import stateless

TORCH = torch.nn.utils.stateless.functional_call

both = pytest.mark.parametrize(
    "call",
    [pytest.param(TORCH, id="torch"), pytest.param(stateless.functional_call, id="fcall")],
)
in_torch_too = pytest.mark.filterwarnings("ignore:`torch.nn.utils.stateless:FutureWarning")
deprecated = pytest.mark.filterwarnings("ignore:`stateless.functional_call` is dep:FutureWarning")


# --- Eager --------------------------------------------------------------------------------------


@in_torch_too
@deprecated
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_result_is_torchs(name: str) -> None:
    module, x = EXAMPLES[name]()
    values = state_of(module, seed=0)
    if name == "parametrized":  # where torch runs right_inverse, as docs/semantics.md tells
        values = {name: v for name, v in values.items() if name != "0.weight"}
    expected = TORCH(module, values, x)
    values = state_of(module, seed=0)
    with unchanged(module):
        assert_close(stateless.functional_call(module, values, x), expected)


@both
@in_torch_too
@deprecated
def test_arguments(call: Callable[..., Any]) -> None:
    module, x = MLP(), torch.rand(5, 3)
    values = state_of(module, seed=0)
    out = call(module, parameters_and_buffers=values, args=(x,), kwargs={"scale": 2.0})
    assert_close(out, 2 * call(module, values, x))


@both
@in_torch_too
@deprecated
def test_what_the_module_reassigns_is_in_the_dict(call: Callable[..., Any]) -> None:
    values = {"foo": torch.zeros(())}
    call(Counter(), values, torch.ones(()))
    assert values["foo"] == 1


@both
@in_torch_too
@deprecated
def test_options(call: Callable[..., Any]) -> None:
    module, tokens = Tied(), torch.arange(5)
    values = state_of(module, seed=0)
    apart = {**values, "out.weight": values["embed.weight"] + 1}
    with pytest.raises(ValueError, match="tie_weights=False"):
        call(module, apart, tokens)
    assert call(module, apart, tokens, tie_weights=False).shape == (5, 7)
    with pytest.raises(RuntimeError, match="Missing key"):
        call(module, {}, tokens, strict=True)


def test_the_signature_is_torchs() -> None:
    ours = inspect.signature(stateless.functional_call).parameters.values()
    torchs = inspect.signature(TORCH).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in torchs
    ]


def test_the_warning() -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(FutureWarning) as warned:
        stateless.functional_call(model, {}, torch.ones(1, 3))
    (warning,) = warned
    for clause in ("`stateless.functional_call` is deprecated", "use `fcall.functional_call`"):
        assert clause in str(warning.message)
    assert warning.filename == __file__


# --- Compiled -----------------------------------------------------------------------------------


@deprecated
@pytest.mark.compiled
@pytest.mark.parametrize("name", ["MLP", "Normed", "Counter", "Tied"])
def test_compiled(name: str) -> None:
    module, x = EXAMPLES[name]()

    def call(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return stateless.functional_call(module, values, x), values

    check_compiled(call, state_of(module, seed=0), x, module=module)


@deprecated
@pytest.mark.compiled
def test_compiled_in_a_gradient() -> None:
    module, x = MLP(), torch.rand(5, 3)

    def gradient(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor]) -> Tensor:
            return stateless.functional_call(module, p, x).square().sum()

        return torch.func.grad(loss)(values)

    values = state_of(module, seed=0)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_close(compiled(values, x), gradient(values, x))


@pytest.mark.compiled
def test_the_warning_is_given_by_the_trace() -> None:
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda p, x: stateless.functional_call(model, p, x), fullgraph=True, backend="aot_eager"
    )
    values = state_of(model, seed=0)
    with pytest.warns(FutureWarning, match=r"use `fcall\.functional_call`"):
        out = compiled(values, x)
    assert_close(out, fcall.functional_call(model, values, x))
    compiled(values, x)  # a warning would be an error


@deprecated
@pytest.mark.compiled
def test_compiled_errors() -> None:
    torch.compiler.reset()
    compiled = torch.compile(stateless.functional_call, fullgraph=True, backend="aot_eager")
    with pytest.raises(fcall.errors.StrictKeysError):
        compiled(nn.Linear(3, 2), {}, torch.ones(1, 3), strict=True)
