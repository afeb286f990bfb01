"""What the device can do at most, measured: a large matrix product, and a large copy.

Beside them stand the rates of what is called: of the operations of its matrix products and
convolutions, and of the bytes that it must read and write at least, each of them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from perf import table
from perf.timing import DEVICE, interleaved

SIZES = {"quick": (64, 2**16), "cpu": (1024, 2**26), "cuda": (8192, 2**30)}
"""The side of a square matrix, and the bytes that are copied."""


@dataclass(frozen=True)
class Ceilings:
    """The best rates that were seen, a second."""

    dtype: str
    flops: float
    bytes: float

    def work(self, call: Callable[[], Any], *moved: Any) -> Work:
        """Return what ``call`` has to do, which reads or writes the tensors in ``moved``."""
        with FlopCounterMode(display=False) as counter:
            call()
        leaves = [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, Tensor)]
        return Work(counter.get_total_flops(), sum(leaf.nbytes for leaf in leaves), self)

    def as_record(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "TFLOP/s": self.flops / 1e12, "TB/s": self.bytes / 1e12}


@dataclass(frozen=True)
class Work:
    """What a call must do at least, and the device's ceilings for it."""

    flops: int
    bytes: int
    ceilings: Ceilings

    def rates(self, us: float) -> dict[str, Any]:
        """Return the rates of a call of ``us`` microseconds, and how far it is from the least time.

        ``gap`` is the share of its time that is above the least.
        """
        seconds = us / 1e6
        least = {"FLOP": self.flops / self.ceilings.flops, "byte": self.bytes / self.ceilings.bytes}
        bound = max(least, key=lambda name: least[name])
        return {
            "tflops": self.flops / seconds / 1e12,
            "tbytes": self.bytes / seconds / 1e12,
            "bound": bound,
            "gap": 1 - least[bound] / seconds,
        }


def measure(dtype: torch.dtype = torch.float32, quick: bool = False) -> Ceilings:
    """Measure the ceilings for products of ``dtype``."""
    side, size = SIZES["quick" if quick else DEVICE.type]
    one, other, out = torch.randn(3, side, side, device=DEVICE, dtype=dtype)
    source, target = torch.ones(2, size, device=DEVICE, dtype=torch.uint8)
    calls = {"product": partial(torch.mm, one, other, out=out)}
    calls["copy"] = partial(target.copy_, source)
    times = interleaved(calls, rounds=3 if quick else 10, seconds=0.001 if quick else 0.02)
    product, copy = (min(taken) / 1e6 for taken in times.values())
    name = str(dtype).removeprefix("torch.")
    return Ceilings(name, 2 * side**3 / product, 2 * size / copy)


def show(*, quick: bool = False) -> None:
    """Print the ceilings of the device."""
    rows = [measure(dtype, quick).as_record() for dtype in (torch.float32, torch.bfloat16)]
    cells = [[table.figure(value) for value in row.values()] for row in rows]
    table.show(f"The ceilings of this {DEVICE.type} device", list(rows[0]), cells, left=["dtype"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    show()
