"""What does an eager functional call cost above the plain call of the module?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fcall
from perf import bench

LAYERS = (6, 36, 144, 600)
"""Numbers of linear layers, with two parameters each, small enough that Python is all the cost."""


def main() -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = [_row(layers) for layers in LAYERS]
    bench.show("eager call: microseconds above module(x)", rows)
    return {"question": __doc__, "unit": "microseconds a call above module(x)", "rows": rows}


def _row(layers: int) -> dict[str, Any]:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = torch.randn(1, 2)
    with torch.no_grad():
        times = bench.interleaved(
            {
                "module": lambda: module(x),
                "torch.func": lambda: torch.func.functional_call(module, weights, (x,)),
                "fcall": lambda: fcall.functional_call(module, weights, (x,)),
            }
        )
    above = bench.overheads(times, "module")
    return {
        "parameters": len(weights),
        "module": times["module"].median,
        "torch.func above": above["torch.func"],
        "fcall above": above["fcall"],
        "ratio": above["torch.func"] / above["fcall"],
    }


if __name__ == "__main__":
    print(bench.store("eager_call", main()))
