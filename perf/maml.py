"""What does a step of MAML cost: the gradient through steps of gradient descent, for many tasks?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perf import bench, ceilings
from perf.models import CALLS, backend, lean, mlp, random, weights_for
from perf.peers import ask
from perf.timing import DEVICE

INNER_STEPS = {"quick": (1,), "cpu": (1, 5), "cuda": (5,)}
SIZES = {
    "quick": (2, 10, (1, 40, 40, 1)),
    "cpu": (16, 10, (1, 40, 40, 1)),
    "cuda": (32, 64, (64, 1024, 1024, 64)),
}
"""Tasks, samples of each, and the widths of the model."""
RATE = 0.1

grad, vmap = torch.func.grad, torch.func.vmap


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    limits = ceilings.measure(quick=quick)
    where = "quick" if quick else DEVICE.type
    tasks, samples, widths = SIZES[where]
    module = mlp(*widths)
    weights = weights_for(module)
    x, y = random(tasks, samples, widths[0]), random(tasks, samples, widths[-1])
    for steps in INNER_STEPS[where]:
        torch.compiler.reset()
        contenders: dict[str, Any] = {}
        for name, call in CALLS.items():

            def loss(p: Any, x: Tensor, y: Tensor, call: Callable[..., Any] = call) -> Tensor:
                return (call(module, p, (x,)) - y).square().mean()

            step = outer_gradient(loss, steps)
            compiled = torch.compile(step, backend=backend(quick), fullgraph=True)
            contenders[name] = partial(step, weights, x, y)
            contenders[f"{name}, compiled"] = partial(compiled, weights, x, y)
        compiled = lean(module, contenders["fcall"].func, weights, quick)
        contenders["fcall.compile"] = partial(compiled, x, y)
        if peers:
            contenders |= ask("JAX", "maml", module, weights, x, y, steps)
        work = limits.work(contenders["torch.func"], weights, x, y, weights)
        rows += bench.measure(contenders, panel="inner steps", n=steps, quick=quick, work=work)
    return bench.record(__doc__, "inner steps", rows, ceilings=limits)


def outer_gradient(loss: Callable[..., Tensor], steps: int) -> Callable[..., dict[str, Tensor]]:
    """Return the gradient of the loss after ``steps``, the mean over tasks."""

    def adapted(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            grads = grad(loss)(weights, x, y)
            weights = {name: w - RATE * grads[name] for name, w in weights.items()}
        return loss(weights, x, y)

    def mean(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return vmap(adapted, in_dims=(None, 0, 0))(weights, x, y).mean()

    return grad(mean)


if __name__ == "__main__":
    bench.run("maml", main)
