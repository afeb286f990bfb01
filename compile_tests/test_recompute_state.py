"""Activation checkpoints in eager calls: the state that backward computes again with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fcall
from compile_tests.support.checkpoints import Checkpointed, Times, leaf, slope
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged

either_kind = pytest.mark.parametrize("reentrant", [False, True])


class Steps(nn.Module):
    """Counts before its checkpoint and in it; the count is a factor."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            self.step = self.step + 1
            x = checkpoint(self.compute, x, use_reentrant=self.reentrant)
        return x

    def compute(self, x: Tensor) -> Tensor:
        self.step = self.step + 1
        return (self.weight * self.step * x).sin()


@either_kind
def test_state_that_the_module_reassigns(reentrant: bool) -> None:
    module, x = Steps(reentrant), leaf(0.3)
    weight = leaf(0.7)
    state = {"weight": weight, "step": torch.tensor(1.0, dtype=torch.float64)}
    with unchanged(module):
        fcall.functional_call(module, state, (x,)).backward()
    again = leaf(0.7)
    (expected,) = torch.autograd.grad((again * 5 * (again * 3 * x).sin()).sin(), again)
    assert_close(weight.grad, expected)
    assert state["step"] == 5  # written back by the call alone


@either_kind
def test_state_that_the_module_deletes(reentrant: bool) -> None:
    class Deletes(Times):
        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "bias"):
                del self.bias
                return checkpoint(self.forward, x, use_reentrant=reentrant)  # type: ignore[no-any-return]
            return super().forward(x)

    module, weight, x = Deletes(), leaf(0.7), leaf(0.3)
    module.register_buffer("bias", torch.zeros(()))
    with unchanged(module):
        fcall.functional_call(module, {"weight": weight, "bias": torch.ones(())}, (x,)).backward()
    assert_close(weight.grad, slope(0.7, 0.3))


@either_kind
def test_buffers_written_in_place_are_written_again(reentrant: bool) -> None:
    """As for a plain module with the same checkpoint."""
    module = Checkpointed(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()), reentrant)
    values = state_of(module)
    twin, x = loaded(module, values), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    parameters, buffers = dict(twin.named_parameters()), dict(twin.named_buffers())
    for name in parameters:
        values[name].requires_grad_()
    twin(x).square().sum().backward()
    with unchanged(module):
        fcall.functional_call(module, values, (x,)).square().sum().backward()
    assert_close([values[n].grad for n in parameters], [p.grad for p in parameters.values()])
    assert_close([values[n] for n in buffers], list(buffers.values()))
    assert values["inner.1.num_batches_tracked"] == 2


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    return module


def _parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh())


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


@either_kind
@pytest.mark.parametrize("inner", [_tied, _parametrized, _Last])
@pytest.mark.parametrize("kind", ["call", "method", "block"])
def test_kinds_of_modules_and_calls(inner: Any, kind: str, reentrant: bool) -> None:
    module = Checkpointed(inner(), reentrant)
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    values = {n: torch.rand_like(p).requires_grad_() for n, p in module.named_parameters()}
    twin = loaded(module, values)
    twin.on = False
    (twin.twice(x) if kind == "method" else twin(x)).sum().backward()
    with unchanged(module):
        if kind == "block":
            with fcall.substitute(module, values):
                out = module(x)
        else:
            method = "twice" if kind == "method" else None
            out = fcall.functional_call(module, values, (x,), method=method)
        out.sum().backward()
    assert_close([v.grad for v in values.values()], [p.grad for p in twin.parameters()])
