"""Modules that look at themselves, parametrizations, and what cannot be called: both ways."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall
from compile_tests.support.models import Affine, Symmetric
from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import TORCH, both

X = torch.tensor([[3.0]])


def identity() -> dict[str, Tensor]:
    """Values with which Affine returns its input."""
    return {
        "layer.weight": torch.ones(1, 1),
        "layer.bias": torch.zeros(1),
        "shift": torch.zeros(1),
    }


# --- Modules that look at themselves ------------------------------------------------------------


class Introspective(Affine):
    def forward(self, x: Tensor) -> Any:
        return list(self.parameters()), list(self.buffers()), dict(self.state_dict(keep_vars=True))


@both
@pytest.mark.parametrize("names", [["layer.weight"], ["layer.weight", "layer.bias", "shift"]])
def test_the_module_finds_the_given_tensors_in_itself(call: Any, names: list[str]) -> None:
    module = Introspective()
    values = {name: value for name, value in identity().items() if name in names}
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers()), **values}
    with unchanged(module):
        parameters, buffers, state = call(module, values, X)
    assert [id(p) for p in parameters] == [id(expected[n]) for n in ("layer.weight", "layer.bias")]
    assert [id(b) for b in buffers] == [id(expected["shift"])]
    assert {name: id(value) for name, value in state.items()} == {
        name: id(value) for name, value in expected.items()
    }


@both
def test_an_unexpected_parameter(call: Any) -> None:
    module, extra = Introspective(), nn.Parameter(torch.zeros(1))
    with unchanged(module):
        parameters, _, _ = call(module, {"layer.extra": extra}, X)
    # fcall gives values to what there is. It registers nothing, so what is not a parameter of the
    # module before the call is none in the call.
    assert any(p is extra for p in parameters) == (call is TORCH)


@both
def test_a_module_that_contains_itself(call: Any) -> None:
    module = Affine()
    module.layer.whole = module
    own = [module.layer.weight, module.layer.bias, module.shift]
    values = identity()
    values = {
        "layer.whole.layer.weight": values["layer.weight"],
        "layer.bias": values["layer.bias"],
        "layer.whole.shift": values["shift"],
    }
    # With ties, torch follows the circle until Python's stack is full.
    assert torch.equal(call(module, values, X, tie_weights=False), X)
    now = [module.layer.weight, module.layer.bias, module.shift]
    assert all(a is b for a, b in zip(own, now))


class CallsItself(nn.Module):
    """Calls itself with other values than it is called with, then uses its own."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, depth: int = 2) -> Any:
        inner: Any = []
        if depth:
            inner = self.call(self, {"weight": self.weight * 10}, (x, depth - 1))
        return [*inner, self.weight * x]


@both
def test_a_module_that_calls_itself(call: Any) -> None:
    module = CallsItself(call)
    with unchanged(module):
        out = call(module, {"weight": torch.tensor(2.0)}, torch.tensor(1.0))
    assert out == [200.0, 20.0, 2.0]


# --- Parametrizations ---------------------------------------------------------------------------


@both
def test_the_original_of_a_parametrization(call: Any) -> None:
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", Symmetric())
    upper = torch.arange(9.0).view(3, 3)
    symmetric = upper.triu() + upper.triu(1).mT
    given = {"parametrizations.weight.original": upper, "bias": torch.zeros(3)}
    with unchanged(module):
        assert torch.equal(call(module, given, torch.eye(3)), symmetric.mT)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(module, given, torch.ones(1, 2))


@both
def test_a_parametrization_with_state_of_its_own(call: Any) -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))
    given = {"parametrizations.weight.original": torch.full((1, 1), 4.0), "bias": torch.zeros(1)}
    own = dict(module.named_parameters())
    out = call(module, given, X)
    torch.testing.assert_close(out, X)  # the norm of a 1 x 1 matrix is its one value
    assert all(p is own[name] for name, p in module.named_parameters())


# --- Lazy modules -------------------------------------------------------------------------------


@both
def test_a_lazy_module_makes_what_it_is_not_given(call: Any) -> None:
    module, x = nn.LazyLinear(2), torch.ones(1, 3)
    out = call(module, {}, x)
    assert type(module) is nn.Linear
    assert torch.equal(module(x), out)


@both
def test_a_lazy_module_that_is_given_all(call: Any) -> None:
    """It turns into a Linear in the call, and with torch.func its own weights stay unmade for good.

    fcall may refuse such a call, but not leave the module broken.
    """
    module, x = nn.LazyLinear(2), torch.ones(1, 3)
    given = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    with contextlib.suppress(fcall.errors.FcallError):
        assert torch.equal(call(module, given, x), torch.full((1, 2), 3.0))
    if call is TORCH:
        with pytest.raises(ValueError, match="uninitialized parameter"):
            module(x)
    else:
        assert module(x).shape == (1, 2)


# --- What cannot be called ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@both
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_jitted_modules(call: Any, make: Any) -> None:
    module = make(Affine())
    with pytest.raises(RuntimeError, match=r"can't be used with .*Jitted module"):
        call(module, identity(), X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@both
def test_inside_of_a_trace(call: Any) -> None:
    module = Affine()
    with (
        unchanged(module),
        pytest.raises(RuntimeError, match=r"can't be used with .*Jitted module"),
    ):
        torch.jit.trace(lambda x: call(module, identity(), x), X)


@both
def test_data_parallel(call: Any) -> None:
    module = nn.DataParallel(Affine())
    with unchanged(module), pytest.raises(RuntimeError, match=r"used with .*nn\.DataParallel"):
        call(module, {"module.shift": torch.zeros(1)}, X)


@both
def test_not_a_module(call: Any) -> None:
    # torch fails in what it happens to look up first.
    error = AttributeError if call is TORCH else fcall.errors.NotAModuleError
    with pytest.raises(error):
        call(torch.sin, {}, X)
