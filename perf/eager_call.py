"""What does an eager functional call cost above the plain call of the module?

It is asked again while another Python thread is alive, since then fcall keeps the values beside the
module's own, where the other thread cannot see them.

The module reads its parameters and computes nothing: beside seconds of operations, what differs
from run to run is more than what a call costs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perf import bench
from perf.models import CALLS, random, weights_for, with_weights
from perf.peers import ask

COUNTS = (12, 72, 288, 1200, 10_000)
DEPTHS = (1, 8, 64)


class Reads(nn.Sequential):
    """Reads what it holds, as a forward does, and computes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self._modules.values():
            if isinstance(part, nn.Linear):
                part.weight, part.bias  # noqa: B018
            else:
                part(x)
        return x


def reads(count: int, depth: int = 1) -> nn.Module:
    """``count`` parameters, in layers of two, the innermost ``depth`` containers down."""
    module = Reads(*[nn.Linear(2, 2) for _ in range(count // 2)]).to(bench.DEVICE)
    for _ in range(depth - 1):
        module = Reads(module)
    return module


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    for count in COUNTS[:2] if quick else COUNTS:
        rows += _rows(reads(count), "one thread", count, quick, peers)
    for depth in DEPTHS[:2] if quick else DEPTHS:
        panel = "72 parameters; n: depth"
        rows += _rows(reads(72, depth), panel, depth, quick, peers)
    with another_thread():
        for count in COUNTS[:2] if quick else COUNTS:
            rows += _rows(reads(count), "another thread alive", count, quick, peers)
    return bench.record(__doc__, "parameters", rows)


def _rows(module: nn.Module, panel: str, n: int, quick: bool, peers: bool) -> list[bench.Row]:
    weights, x = weights_for(module), random(1, 2)
    contenders = {"module": partial(with_weights(module, weights), x)}
    contenders |= {name: partial(call, module, weights, (x,)) for name, call in CALLS.items()}
    if peers:
        calls = ask("tensordict", "eager", module, weights)
        contenders |= {name: partial(call, x) for name, call in calls.items()}
    with torch.no_grad():
        return bench.measure(
            contenders, panel=panel, n=n, quick=quick, above="module", memory=False
        )


@contextlib.contextmanager
def another_thread() -> Iterator[None]:
    """Have a thread that waits."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    bench.run("eager_call", main)
