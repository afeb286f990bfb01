"""What do the gradients of each sample cost: one at a time, and under vmap?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perf import bench, ceilings
from perf.models import (
    CALLS,
    backend,
    blocks,
    convnet,
    lean,
    mlp,
    random,
    weights_near,
    with_weights,
)
from perf.peers import ask
from perf.timing import DEVICE

grad, vmap = torch.func.grad, torch.func.vmap


class Place(NamedTuple):
    """A model, the shape of a sample and of its target, and how many samples there are."""

    module: Callable[[], nn.Module]
    sample: tuple[int, ...]
    target: tuple[int, ...]
    batches: tuple[int, ...]


PLACES = {
    "quick": {
        "samples": Place(partial(mlp, 16, 64, 64, 8), (16,), (8,), (16,)),
        "convnet; n: samples": Place(partial(convnet, 2), (3, 8, 8), (10,), (2,)),
        "transformer block; n: samples": Place(partial(blocks, 1, 16), (4, 16), (4, 16), (2,)),
    },
    "cpu": {
        "samples": Place(partial(mlp, 16, 64, 64, 8), (16,), (8,), (1, 16, 256)),
        "convnet; n: samples": Place(partial(convnet, 8), (3, 32, 32), (10,), (1, 16)),
        "transformer block; n: samples": Place(partial(blocks, 1, 64), (16, 64), (16, 64), (1, 16)),
    },
    "cuda": {
        "convnet; n: samples": Place(partial(convnet, 64), (3, 32, 32), (10,), (256,)),
        "transformer block; n: samples": Place(
            partial(blocks, 1, 512), (128, 512), (128, 512), (64,)
        ),
    },
}


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    limits = ceilings.measure(quick=quick)
    for panel, place in PLACES["quick" if quick else DEVICE.type].items():
        module = place.module()
        weights = weights_near(module)
        for batch in place.batches:
            torch.compiler.reset()
            x, y = random(batch, *place.sample), random(batch, *place.target)
            contenders = _contenders(module, weights, x, y, quick)
            if peers:
                twin = with_weights(module, weights)
                contenders |= ask("JAX", "per_sample_gradients", twin, x, y)
            # Fused attention has no batching rule: vmap would call it once a sample.
            with sdpa_kernel(SDPBackend.MATH):
                # What is written is a gradient of each weight for each sample.
                work = limits.work(contenders["torch.func"], x, y, [weights] * (1 + batch))
                rows += bench.measure(contenders, panel=panel, n=batch, quick=quick, work=work)
    return bench.record(__doc__, "samples", rows, ceilings=limits)


def _contenders(
    module: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor, quick: bool
) -> dict[str, Callable[[], Any]]:
    compile = partial(torch.compile, backend=backend(quick), fullgraph=True)
    contenders: dict[str, Any] = {}
    for name, call in CALLS.items():

        def loss(p: Any, x: Tensor, y: Tensor, call: Callable[..., Any] = call) -> Tensor:
            return (call(module, p, (x,)) - y).square().mean()

        each = vmap(grad(loss), in_dims=(None, 0, 0))
        contenders[name] = partial(each, weights, x, y)
        contenders[f"{name}, compiled"] = partial(compile(each), weights, x, y)
    compiled = lean(module, contenders["fcall"].func, weights, quick)
    contenders["fcall.compile"] = partial(compiled, x, y)
    if any(isinstance(layer, nn.Tanh) for layer in module):  # type: ignore[attr-defined]  # an MLP
        contenders["by hand"] = partial(_by_hand, weights, x, y)
        contenders["by hand, compiled"] = partial(compile(_by_hand), weights, x, y)
    return contenders | {"a loop": partial(_loop, with_weights(module, weights), x, y)}


def _by_hand(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Do what backward does for an MLP, without the sum over the samples."""
    layers = sorted({name.partition(".")[0] for name in weights}, key=int)
    inputs = [x]
    for layer in layers:
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        inputs.append(torch.addmm(bias, inputs[-1], weight.T))
        if layer != layers[-1]:
            inputs[-1] = inputs[-1].tanh()
    grads = {}
    grad = (inputs.pop() - y) * (2 / y.shape[1])
    for layer in reversed(layers):
        before = inputs.pop()
        grads[f"{layer}.bias"] = grad
        grads[f"{layer}.weight"] = torch.einsum("no,ni->noi", grad, before)
        if inputs:
            grad = grad @ weights[f"{layer}.weight"] * (1 - before.square())
    return {name: grads[name] for name in weights}


def _loop(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in module.named_parameters()]
    grads = [
        torch.autograd.grad((module(a) - b).square().mean(), list(module.parameters()))
        for a, b in zip(x, y)
    ]
    return {name: torch.stack(of_one) for name, of_one in zip(names, zip(*grads))}


if __name__ == "__main__":
    bench.run("per_sample_gradients", main)
