"""Three sets of weights for one module, and the module a set belongs to."""

import copy

import torch
from torch import Tensor, nn

from demo.encoder import state

NOISE = 0.1
"""How far the noisy set lies from the pretrained weights (0) to pure noise (1)."""


def weight_sets(module: nn.Module, seed: int) -> dict[str, dict[str, Tensor]]:
    """The weights the demo swaps, by the name of the set.

    Each set holds every parameter and buffer of `module`; only the parameters differ. The noise
    has each parameter's own standard deviation and is drawn from `seed`.
    """
    pretrained = state(module)
    generator = torch.Generator().manual_seed(seed)
    rounded, noisy = dict(pretrained), dict(pretrained)
    for name, weight in module.named_parameters():
        rounded[name] = weight.bfloat16().to(weight.dtype)
        noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0)
        noisy[name] = weight.lerp(noise, NOISE)
    return {"pretrained": pretrained, "bf16-rounded": rounded, f"{NOISE:.0%} noise": noisy}


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A deep copy of `module` that holds `weights`: what every functional call must agree with."""
    oracle = copy.deepcopy(module)
    for name, tensor in state(oracle).items():
        tensor.copy_(weights[name])
    return oracle
