"""What does a compiled functional call cost: to compile once, and in Python at each call?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fcall
from perf import bench

LAYERS = (6, 36, 144)
"""Numbers of linear layers, with two parameters each."""


def main() -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = [row for layers in LAYERS for row in _rows(layers)]
    bench.show("compiled call (backend aot_eager)", rows)
    return {"question": __doc__, "rows": rows}


def _rows(layers: int) -> list[dict[str, Any]]:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = torch.randn(1, 2)

    def of_torch(weights: Any, x: Any) -> Any:
        return torch.func.functional_call(module, weights, (x,))

    def of_fcall(weights: Any, x: Any) -> Any:
        return fcall.functional_call(module, weights, (x,))

    torch.compiler.reset()
    contenders: dict[str, Callable[[], Any]] = {}
    seconds = {}
    with torch.no_grad():
        for name, fn in {
            "module": lambda _, x: module(x),
            "torch.func": of_torch,
            "fcall": of_fcall,
        }.items():
            compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
            start = time.perf_counter()
            compiled(weights, x)
            seconds[name] = time.perf_counter() - start
            contenders[name] = lambda compiled=compiled: compiled(weights, x)
        times = bench.interleaved(contenders)
    return [
        {
            "parameters": len(weights),
            "contender": name,
            "seconds to compile": seconds[name],
            "us a call": times[name].median,
            "of torch.func": times[name].median / times["torch.func"].median,
        }
        for name in contenders
    ]


if __name__ == "__main__":
    print(bench.store("compiled_call", main()))
