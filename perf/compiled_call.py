"""What does a compiled functional call cost on the host, where the graph has next to no work?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf import bench
from perf.models import CALLS, backend, random, weights_for, with_weights

COUNTS = (12, 72, 288, 1200)


class Sum(nn.Module):
    """Next to no work, but for a use of each parameter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(2) for _ in range(count)]).to(bench.DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + weight
        return x


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    for count in COUNTS[:1] if quick else COUNTS:
        torch.compiler.reset()
        module, x = Sum(count), random(2)
        weights = weights_for(module)
        compile = partial(torch.compile, fullgraph=True, backend=backend(quick))
        functions: dict[str, Callable[..., Any]] = {
            "module, compiled": _alone(compile(with_weights(module, weights))),
            **{
                f"{name}, compiled": compile(_calling(call, module)) for name, call in CALLS.items()
            },
            "fcall.compile": fcall.compile(module, backend=backend(quick)),
        }
        contenders = {name: partial(fn, weights, x) for name, fn in functions.items()}
        if peers:
            from perf import peers as others

            contenders["tensordict, compiled"] = compile(others.to_module(module, weights, x))
            contenders |= others.sums(weights, x)
        with torch.no_grad():
            rows += bench.measure(
                contenders, panel="parameters", n=count, quick=quick, memory=False
            )
    return bench.record(__doc__, "parameters", rows)


def _alone(module: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weights, x: module(x)


def _calling(call: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda weights, x: call(module, weights, (x,))


if __name__ == "__main__":
    bench.run("compiled_call", main)
