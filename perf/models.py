"""The modules that the questions call, the weights that they are given, and who is asked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf.bench import DEVICE

CALLS: dict[str, Callable[..., Any]] = {
    "torch.func": torch.func.functional_call,
    "fcall": fcall.functional_call,
}


def linears(count: int) -> nn.Module:
    """Linear layers with two parameters each, small enough that Python is all the cost."""
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)]).to(DEVICE)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, tanh in between."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(DEVICE)


def encoder(layers: int) -> nn.Module:
    """A small transformer encoder, as in training, without dropout."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(DEVICE)


def weights_for(module: nn.Module) -> dict[str, Tensor]:
    """Values for the parameters of ``module``, other than its own, by name."""
    return {name: torch.randn_like(p) / p.shape[-1] for name, p in module.named_parameters()}


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that owns ``weights``."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(weights)
    return twin


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def backend(quick: bool) -> str:
    """The backend of compiled contenders: where figures are rough, one that compiles nothing."""
    return "eager" if quick else "inductor"


class OfWeights(nn.Module):
    """A function of a model's weights as a module, for ``fcall.compile``."""

    def __init__(self, model: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(dict(self.model.named_parameters()), *args)


def lean(model: nn.Module, fn: Callable[..., Any], weights: dict[str, Tensor], quick: bool) -> Any:
    """Return ``fn`` of these weights, compiled by ``fcall.compile``, as a function of the rest."""
    compiled = fcall.compile(OfWeights(model, fn), backend=backend(quick), dynamic=False)
    own = {f"model.{name}": weight for name, weight in weights.items()}
    return lambda *args: compiled(own, *args)
