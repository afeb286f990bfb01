"""What does a call cost that is recorded as CUDA graphs, with K sets of weights in turn?

A call of a contender calls the model once with each of the sets, or trains it for a step. Outputs
are copied, since the next call writes to their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf import bench, ceilings
from perf.models import CALLS, backend, mlp, random, weights_near, with_weights
from perf.timing import DEVICE

PLACES = (("forward", 1), ("forward", 4), ("forward", 16), ("training step", 1))
"""What is called, and with how many sets: those that :func:`fcall.compile` has graphs for, and
more."""

WIDTHS = {"quick": (16, 3), "cpu": (128, 7), "cuda": (2048, 9)}

Call = Callable[[dict[str, Tensor], Tensor], Tensor]


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    width, layers = WIDTHS["quick" if quick else DEVICE.type]
    limits = ceilings.measure(quick=quick)
    module, x = mlp(*[width] * layers), random(16, width)
    rows = []
    for what, count in PLACES[::3] if quick else PLACES:
        torch.compiler.reset()
        sets = [
            {name: w.requires_grad_() for name, w in weights_near(module).items()}
            for _ in range(count)
        ]
        step = _forward if what == "forward" else _step
        contenders = {
            name: partial(_with_each, step, call, of_call, x)
            for name, (call, of_call) in _calls(module, sets, quick).items()
        }
        eager = partial(
            _with_each, step, lambda w, x: CALLS["torch.func"](module, w, (x,)), sets, x
        )
        moved = [
            sets,
            sets if what != "forward" else x,
        ]  # gradients are as large as what they are of
        work = limits.work(eager, moved)
        rows += bench.measure(contenders, panel=what, n=count, quick=quick, work=work)
    return bench.record(__doc__, "weight sets", rows, ceilings=limits)


def _calls(
    module: nn.Module, sets: list[dict[str, Tensor]], quick: bool
) -> dict[str, tuple[Callable[..., Any], list[dict[str, Tensor]]]]:
    """Return for each contender a function of weights and inputs, and its sets of weights."""
    settings: dict[str, Any] = {"backend": backend(quick)}
    graphs: dict[str, Any] = {} if quick else {"mode": "reduce-overhead"}
    compile = partial(torch.compile, fullgraph=True, dynamic=False, **settings, **graphs)
    twins = [with_weights(module, weights) for weights in sets]
    compiled = {id(twin): compile(twin) for twin in twins}
    of_twins = [dict(twin.named_parameters()) for twin in twins]
    by_weights = {id(own): compiled[id(twin)] for own, twin in zip(of_twins, twins)}
    call = CALLS["torch.func"]
    copied = {} if quick else {"static_sets": 0}
    own = partial(fcall.compile, module, dynamic=False, **settings, **graphs)
    return {
        "module, compiled": (lambda weights, x: by_weights[id(weights)](x), of_twins),
        "torch.func, compiled": (compile(lambda weights, x: call(module, weights, (x,))), sets),
        "fcall.compile": (own(), sets),
        "fcall.compile, all weights copied": (own(**copied), sets),
    }


def _with_each(
    step: Callable[..., Any], call: Call, sets: list[dict[str, Tensor]], x: Tensor
) -> list[Any]:
    return [step(call, weights, x) for weights in sets]


def _forward(call: Call, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(weights, x).clone()


def _step(call: Call, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Return the loss, and of the gradients those of vectors: they need all of backward."""
    loss = call(weights, x).square().mean()
    grads = torch.autograd.grad(loss, list(weights.values()))
    return [loss.detach().clone(), *(grad.clone() for grad in grads if grad.ndim == 1)]


if __name__ == "__main__":
    bench.run("cuda_graphs", main)
