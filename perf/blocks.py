"""What do transformer encoder blocks cost that are given their weights, called and trained?

The weights are read once in each call, and in a training step their gradients are written: with a
small batch that is the least a call can take, with a large one the products of matrices are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perf import bench, ceilings
from perf.models import CALLS, blocks, compiled_calls, random, weights_near
from perf.peers import ask
from perf.timing import DEVICE


class Sizes(NamedTuple):
    """``blocks``: how many of them, and how wide; the two batches; ``tokens`` in a sequence."""

    blocks: tuple[tuple[int, int], ...]
    batches: tuple[int, int]
    tokens: int
    dtype: torch.dtype
    tolerances: dict[str, float]


IN_32_BITS = {"forward": 1e-3, "training step": 1e-3}
# Gradients of layer norm on the CPU, and XLA's sums over tokens, are so far from float64.
IN_16_BITS = {"forward": 0.05, "training step": 0.25}

SIZES = {
    "quick": Sizes(((1, 32),), (1, 2), 8, torch.bfloat16, IN_16_BITS),
    "cpu": Sizes(((2, 64), (3, 256)), (1, 16), 32, torch.float32, IN_32_BITS),
    "cuda": Sizes(((3, 512), (2, 2048), (3, 5120)), (1, 64), 128, torch.bfloat16, IN_16_BITS),
}


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    sizes = SIZES["quick" if quick else DEVICE.type]
    limits = ceilings.measure(sizes.dtype, quick)
    small, large = sizes.batches
    places = [("forward", small), ("forward", large), ("training step", large)]
    rows = []
    for layers, width in sizes.blocks:
        module = blocks(layers, width).to(sizes.dtype)
        weights = {name: w.requires_grad_() for name, w in weights_near(module).items()}
        count = sum(p.numel() for p in module.parameters())
        for what, batch in places:
            torch.compiler.reset()
            x = random(batch, sizes.tokens, width, dtype=sizes.dtype)
            contenders, work = _of_place(what, module, weights, x, limits, quick, peers)
            rows += bench.measure(
                contenders,
                panel=f"{what}, batch {batch}",
                n=count,
                quick=quick,
                tolerance=sizes.tolerances[what],
                work=work,
            )
    return bench.record(__doc__, "parameters", rows, ceilings=limits)


def _of_place(
    what: str,
    module: nn.Module,
    weights: dict[str, Tensor],
    x: Tensor,
    limits: ceilings.Ceilings,
    quick: bool,
    peers: bool,
) -> tuple[dict[str, Callable[[], Any]], ceilings.Work]:
    """Return the contenders, and what each must do at least."""
    train = what == "training step"
    step = _step if train else _forward
    calls = compiled_calls(module, weights, quick, peers)
    contenders = {name: partial(step, *call, x) for name, call in calls.items()}
    if peers:
        contenders |= ask("JAX", "blocks", module, weights, x, train=train)

    def eager(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return CALLS["torch.func"](module, weights, (x,))  # type: ignore[no-any-return]

    moved = [weights, x, weights if train else x]  # what is written is as large
    return contenders, limits.work(partial(step, eager, weights, x), moved)


def _forward(call: Callable[..., Any], weights: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(weights, x)  # type: ignore[no-any-return]


def _step(call: Callable[..., Any], weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Return the loss, and of the gradients those of vectors: they need all of backward."""
    loss = call(weights, x).square().mean()
    grads = torch.autograd.grad(loss, list(weights.values()))
    return [loss, *(grad for grad in grads if grad.ndim == 1)]


if __name__ == "__main__":
    bench.run("blocks", main)
