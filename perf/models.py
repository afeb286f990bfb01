"""The modules that the questions call, the weights that they are given, and who is asked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf.peers import ask
from perf.timing import DEVICE

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


def blocks(layers: int, width: int) -> nn.Module:
    """Transformer encoder blocks as large models have them: normalised first, GELU, no dropout."""
    heads = max(1, width // 128)
    of_block = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.Sequential(
        *[nn.TransformerEncoderLayer(width, heads, 4 * width, **of_block) for _ in range(layers)]  # type: ignore[arg-type]
    ).to(DEVICE)


def convnet(width: int) -> nn.Module:
    """Three convolutions, each at half of the resolution, and a classifier; also of one image."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(4 * width, 10)]
    return nn.Sequential(*layers).to(DEVICE)


def weights_near(module: nn.Module) -> dict[str, Tensor]:
    """As :func:`weights_for`, near the module's own: a deep model keeps the size of its values."""
    named = module.named_parameters()
    return {name: p.detach() + 0.02 * torch.randn_like(p) for name, p in named}


def weights_for(module: nn.Module) -> dict[str, Tensor]:
    """Values for the parameters of ``module``, other than its own, by name."""
    return {name: torch.randn_like(p) / p.shape[-1] for name, p in module.named_parameters()}


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that owns ``weights``."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(weights)
    return twin


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


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


def compiled_calls(
    module: nn.Module, weights: dict[str, Tensor], quick: bool, peers: bool
) -> dict[str, tuple[Callable[..., Any], dict[str, Tensor]]]:
    """Return compiled calls of ``module``: functions of weights and inputs, with their weights."""
    compile = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend(quick))
    twin = with_weights(module, weights)
    alone = compile(twin)

    def over(call: Callable[..., Any]) -> Callable[..., Any]:
        return compile(lambda weights, *args: call(module, weights, args))

    calls = {f"{name}, compiled": over(call) for name, call in CALLS.items()}
    calls["fcall.compile"] = fcall.compile(module, backend=backend(quick), dynamic=False)
    if peers:
        for name, call in ask("tensordict", "compiled", module, weights, compile).items():
            calls[name] = _of_inputs(call)
    return {
        "module, compiled": (_of_inputs(alone), dict(twin.named_parameters())),
        **{name: (call, weights) for name, call in calls.items()},
    }


def _of_inputs(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weights, *args: call(*args)
