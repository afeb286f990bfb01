"""What does a compiled functional call cost on the host, where the graph has next to no work?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perf import bench
from perf.models import compiled_calls, random, weights_for
from perf.peers import ask

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
        calls = compiled_calls(module, weights, quick, peers)
        contenders = {name: partial(call, weights, x) for name, (call, _) in calls.items()}
        if peers:
            contenders |= ask("JAX", "sums", weights, x)
        with torch.no_grad():
            rows += bench.measure(
                contenders, panel="parameters", n=count, quick=quick, memory=False
            )
    return bench.record(__doc__, "parameters", rows)


if __name__ == "__main__":
    bench.run("compiled_call", main)
