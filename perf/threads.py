"""How do calls of one module from many threads at once scale?

Each thread gives the module weights of its own. ``torch.func`` needs a lock, or copies of the
module; without, its results are wrong, which ``wrong`` counts, and so are the dicts it was given.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perf import bench
from perf.models import CALLS, mlp, random, weights_for, with_weights

THREADS = (1, 2, 4, 8)
CALLS_EACH = 8


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    width = 32 if quick else 512  # wide enough that operations release the GIL for long
    rows = []
    for count in THREADS[:2] if quick else THREADS:
        module, x = mlp(*[width] * 5), random(width // 4, width)
        sets = [weights_for(module) for _ in range(count)]
        with torch.no_grad():
            expected = [with_weights(module, weights)(x) for weights in sets]
        with ThreadPoolExecutor(count) as pool:
            calls = _calls(module, count)
            contenders = {
                name: partial(_round, pool, call, sets, x) for name, call in calls.items()
            }
            found = bench.measure(
                contenders,
                panel=f"{CALLS_EACH} calls a thread",
                n=count,
                quick=quick,
                memory=False,
                tolerance=math.inf,  # those without a lock are there since they are wrong
            )
            wrong = {name: _wrong(call(), expected) for name, call in contenders.items()}
        rows += [row | {"wrong": wrong[row["contender"]]} for row in found]
    return bench.record(__doc__, "threads", rows)


def _calls(module: torch.nn.Module, count: int) -> dict[str, Callable[..., Any]]:
    lock = threading.Lock()
    of_torch, of_fcall = CALLS.values()
    copies = [copy.deepcopy(module) for _ in range(count)]
    bare = copy.deepcopy(module)

    def locked(number: int, weights: dict[str, Tensor], x: Tensor) -> Any:
        with lock:
            return of_torch(module, weights, (x,))

    return {
        "torch.func": locked,
        "torch.func on copies": lambda i, weights, x: of_torch(copies[i], weights, (x,)),
        "torch.func without a lock": lambda i, weights, x: of_torch(bare, dict(weights), (x,)),
        "fcall": lambda i, weights, x: of_fcall(module, weights, (x,)),
    }


def _round(
    pool: ThreadPoolExecutor,
    call: Callable[..., Any],
    sets: list[dict[str, Tensor]],
    x: Tensor,
) -> list[Any]:
    """Have all threads call, and return their last results."""

    def calls(number: int) -> Any:
        with torch.no_grad():
            return [call(number, sets[number], x) for _ in range(CALLS_EACH)][-1]

    return list(pool.map(calls, range(len(sets))))


def _wrong(results: list[Tensor], expected: list[Tensor]) -> int:
    pairs = zip(results, expected)
    return sum(not torch.allclose(one, other, atol=1e-4) for one, other in pairs)


if __name__ == "__main__":
    bench.run("threads", main)
