"""What do the gradients of each sample cost: one at a time, and under vmap?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perf import bench
from perf.models import CALLS, backend, lean, mlp, random, weights_for, with_weights

BATCHES = (1, 16, 256)

grad, vmap = torch.func.grad, torch.func.vmap


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    module = mlp(16, 64, 64, 8)
    weights = weights_for(module)
    twin = with_weights(module, weights)
    for batch in BATCHES[1:2] if quick else BATCHES:
        torch.compiler.reset()
        x, y = random(batch, 16), random(batch, 8)
        contenders: dict[str, Any] = {}
        for name, call in CALLS.items():

            def loss(p: Any, x: Tensor, y: Tensor, call: Callable[..., Any] = call) -> Tensor:
                return (call(module, p, (x,)) - y).square().mean()

            each = vmap(grad(loss), in_dims=(None, 0, 0))
            compiled = torch.compile(each, backend=backend(quick), fullgraph=True)
            contenders[name] = partial(each, weights, x, y)
            contenders[f"{name}, compiled"] = partial(compiled, weights, x, y)
        compiled = lean(module, contenders["fcall"].func, weights, quick)
        contenders["fcall.compile"] = partial(compiled, x, y)
        compiled = torch.compile(_by_hand, backend=backend(quick), fullgraph=True)
        contenders["by hand"] = partial(_by_hand, weights, x, y)
        contenders["by hand, compiled"] = partial(compiled, weights, x, y)
        contenders["a loop"] = partial(_loop, twin, x, y)
        if peers:
            from perf import peers as others

            contenders |= others.per_sample_gradients(twin, x, y)
        rows += bench.measure(contenders, panel="samples", n=batch, quick=quick)
    return bench.record(__doc__, "samples", rows)


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


def _loop(module: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in module.named_parameters()]
    grads = [
        torch.autograd.grad((module(a) - b).square().mean(), list(module.parameters()))
        for a, b in zip(x, y)
    ]
    return {name: torch.stack(of_one) for name, of_one in zip(names, zip(*grads))}


if __name__ == "__main__":
    bench.run("per_sample_gradients", main)
