"""Results of the call against the oracle: outputs, gradients and buffers, for every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.models import EXAMPLES, MLP, Affine, PythonState, Recurrent
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from fcall import functional_call

Make = Callable[[], tuple[nn.Module, Tensor]]


def _recurrent(cell: Any) -> tuple[nn.Module, Tensor]:
    module = Recurrent()
    module.lstm = cell(3, 4, batch_first=True, num_layers=2, bidirectional=True)
    module.head = nn.Linear(8, 2)
    return module, torch.rand(2, 5, 3)


MODELS: dict[str, Make] = {
    **EXAMPLES,
    "Affine": lambda: (Affine(), torch.rand(4, 1)),
    "PythonState": lambda: (PythonState(), torch.rand(2, 3)),
    "LSTM": lambda: (Recurrent(), torch.rand(2, 5, 3)),
    "LSTM of two layers": lambda: _recurrent(nn.LSTM),
    "GRU": lambda: _recurrent(nn.GRU),
    "RNN": lambda: _recurrent(nn.RNN),
    "GraphModule": lambda: (torch.fx.symbolic_trace(MLP()), torch.rand(2, 3)),
    "transformer": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        torch.rand(2, 4, 8),
    ),
}

models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Case:
    """A model in a dtype, an input, new values, and the float64 twin that owns them."""

    def __init__(self, make: Make, dtype: torch.dtype, every: int = 1) -> None:
        torch.manual_seed(0)
        self.module, x = make()
        self.module.to(dtype)
        self.x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
        values = {
            # Smaller, for gradients that float32 can tell.
            name: value * 0.5 if value.is_floating_point() else value
            for name, value in state_of(self.module, seed=1).items()
        }
        self.values = dict(list(values.items())[::every])
        self.trained = [n for n, _ in self.module.named_parameters() if n in self.values]
        self.twin = loaded(self.module, self.values)
        self.twin_x = in_float64(self.x)
        for name in self.trained:
            self.values[name].requires_grad_()

    def check(self, out: Tensor, given: dict[str, Tensor]) -> None:
        """Compare the output, its gradients, and the buffers in ``given`` with the twin's."""
        expected = self.twin(self.twin_x)
        assert out.dtype == self.x.dtype if self.x.is_floating_point() else True
        assert_close(out, expected)
        own = {**dict(self.twin.named_parameters()), **dict(self.twin.named_buffers())}
        ours, theirs = [self.values[n] for n in self.trained], [own[n] for n in self.trained]
        if self.x.requires_grad:
            ours, theirs = [*ours, self.x], [*theirs, self.twin_x]
        if ours:
            assert_close(
                torch.autograd.grad(out.square().mean(), ours),
                torch.autograd.grad(expected.square().mean(), theirs),
            )
        buffers = [name for name in given if name not in self.trained]
        assert_close({n: given[n] for n in buffers}, {n: own[n] for n in buffers})


@models
@dtypes
def test_all_values_given(make: Make, dtype: torch.dtype) -> None:
    case = Case(make, dtype)
    given = dict(case.values)
    with unchanged(case.module):
        out = functional_call(case.module, given, case.x, strict=True)
    case.check(out, given)


@models
@dtypes
def test_every_second_value_given(make: Make, dtype: torch.dtype) -> None:
    case = Case(make, dtype, every=2)
    given = dict(case.values)
    out = functional_call(case.module, given, (case.x,))
    case.check(out, given)


@models
def test_parameters_and_buffers_in_two_dicts(make: Make) -> None:
    case = Case(make, torch.float64)
    params = {name: case.values[name] for name in case.trained}
    buffers = {name: value for name, value in case.values.items() if name not in params}
    out = functional_call(case.module, (params, buffers), case.x)
    case.check(out, {**params, **buffers})


@models
def test_values_in_turn(make: Make) -> None:
    """Nothing of one call is left in the next."""
    case = Case(make, torch.float64)
    module, x = case.module, case.x.detach()
    first = state_of(module, seed=2)
    second = {
        name: v * 0.5 if v.is_floating_point() else v
        for name, v in state_of(module, seed=3).items()
    }
    with unchanged(module):
        for values in (first, second, first):
            if isinstance(module, PythonState):
                module.calls = 0
            expected = loaded(module, values)(x)
            assert_close(functional_call(module, dict(values), x), expected)


@models
def test_the_modules_own_values_given(make: Make) -> None:
    case = Case(make, torch.float64)
    own = {**dict(case.module.named_parameters()), **dict(case.module.named_buffers())}
    twin = loaded(case.module, {})
    out = functional_call(case.module, dict(own), case.x.detach())
    assert_close(out, twin(case.x.detach()))
    for name, tensor in case.module.named_parameters():
        assert tensor is own[name]


def test_the_fast_path_of_a_transformer() -> None:
    """In inference torch.nn's layers read their weights by themselves, for one fused operation."""
    case = Case(MODELS["transformer"], torch.float64)
    case.module.eval()
    with torch.no_grad(), unchanged(case.module):
        out = functional_call(case.module, dict(case.values), case.x)
    assert_close(out, case.twin.eval()(case.twin_x).detach())


def test_values_of_another_dtype_than_the_modules() -> None:
    module, x = MLP(), torch.rand(2, 3, dtype=torch.float64)
    values = {name: value.double() for name, value in state_of(module, seed=1).items()}
    with unchanged(module):
        out = functional_call(module, values, x)
    assert out.dtype == torch.float64
    assert_close(out, loaded(module, values)(x))


def test_values_of_another_shape_than_the_modules() -> None:
    module = nn.Linear(3, 2)
    with unchanged(module):
        out = functional_call(
            module, {"weight": torch.ones(5, 4), "bias": torch.zeros(5)}, torch.ones(1, 4)
        )
    assert torch.equal(out, torch.full((1, 5), 4.0))


def test_second_derivatives() -> None:
    case = Case(MODELS["Attention"], torch.float64)
    ours = [case.values[name] for name in case.trained]
    own = dict(case.twin.named_parameters())
    theirs = [own[name] for name in case.trained]

    def penalty(out: Tensor, weights: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(out.square().mean(), weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))

    out = functional_call(case.module, dict(case.values), case.x)
    assert_close(penalty(out, ours), penalty(case.twin(case.twin_x), theirs))


def test_gradients_accumulate_over_calls() -> None:
    module, x = MLP(), torch.rand(2, 3)
    values = {name: v.requires_grad_() for name, v in state_of(module, seed=1).items()}
    twin = loaded(module, values)
    for scale in (1.0, 2.0):
        functional_call(module, values, x, {"scale": scale}).sum().backward()
        twin(x.double(), scale=scale).sum().backward()
    assert_close(
        {name: v.grad for name, v in values.items()},
        {name: p.grad for name, p in twin.named_parameters()},
    )
    assert all(p.grad is None for p in module.parameters())
