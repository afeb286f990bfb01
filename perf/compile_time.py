"""How long does it take to compile, and how does that grow with parameters and with calls?

Nothing is taken from caches on disk, but for C++ that was built before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fcall
from perf import bench
from perf.models import CALLS, backend, mlp, random, weights_for, with_weights

LAYERS = (6, 36, 144)
CALLS_IN_GRAPH = (1, 5, 20)
ROUNDS = 3


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    for layers in (2,) if quick else LAYERS:
        rows += _rows(layers, 1, "one call; n: parameters", 2 * layers, quick)
    for calls in (2,) if quick else CALLS_IN_GRAPH:
        layers = 1 if quick else 6
        panel = f"{2 * layers} parameters; n: calls in one graph"
        rows += _rows(layers, calls, panel, calls, quick)
    return bench.record(__doc__, "n", rows, unit="s")


def _rows(layers: int, calls: int, panel: str, n: int, quick: bool) -> list[bench.Row]:
    module, x = mlp(*[8] * (layers + 1)), random(4, 8)
    weights = weights_for(module)
    twin = with_weights(module, weights)
    compile = partial(torch.compile, fullgraph=True, backend=backend(quick))

    def calling(call: Callable[..., Any]) -> Callable[..., Any]:
        def fn(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            for _ in range(calls):
                x = call(module, weights, (x,))
            return x

        return fn

    contenders: dict[str, Callable[[], Callable[..., Any]]] = {
        "module, compiled": partial(compile, calling(lambda module, weights, args: twin(*args))),
        **{f"{name}, compiled": partial(compile, calling(call)) for name, call in CALLS.items()},
    }
    if calls == 1:
        contenders["fcall.compile"] = lambda: fcall.compile(module, backend=backend(quick))
    # The first time imports the compiler, and builds the C++.
    outs = {name: _first_call(make(), weights, x)[0] for name, make in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2 if quick else ROUNDS):
        for name, make in contenders.items():
            taken[name].append(_first_call(make(), weights, x)[1])
    expected = outs["module, compiled"]
    extra = {name: {"off_by": bench.difference(out, expected)} for name, out in outs.items()}
    return bench.rows_of(taken, panel=panel, n=n, extra=extra)


def _first_call(fn: Callable[..., Any], weights: dict[str, Tensor], x: Tensor) -> tuple[Any, float]:
    torch.compiler.reset()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        out = fn(weights, x)
        return out, time.perf_counter() - start


if __name__ == "__main__":
    bench.run("compile_time", main)
