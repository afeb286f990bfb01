"""Sets of weights, where compiled code is recorded as CUDA graphs.

A CUDA graph reads what it is given at the addresses at which it was recorded. torch has two ways to
call one with other tensors. It copies them to where the graph reads, at each call, as it does with
inputs; or, if they are *static*, as the parameters of a module, it compares addresses, and records
another graph for each new set of them, without a bound.

So a frame has a twin: one is compiled for static weights, one for weights that are copied. Which of
them takes a call is decided here. A set of weights, known by its addresses, may have a graph of its
own, which is replayed with no copy: the first, and others once they come back, up to a number.
Nothing depends on which tensors these are: who is at a known address is read there, be it new, and
who has moved is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcall._torch import cuda_graphs

__all__ = ["STATIC_SETS", "WeightSets", "weight_sets"]

STATIC_SETS = 8
"""How many sets have graphs of their own, if nothing else is said."""

DEVICES = frozenset({"cuda"})
"""The kinds of devices on which Inductor records graphs."""

SEEN = 64
"""How many sets are remembered that have no graph of their own. The oldest goes first."""

ALIGNMENT = 16
"""Bytes. Kernels that were compiled for static inputs take it for granted."""


class WeightSets:
    """The sets of weights, of one kind, that have CUDA graphs of their own.

    Args:
        limit: How many there may be.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._static: dict[int, tuple[Callable[[list[Tensor]], bool], ...]] = {}
        """What knows a set by its addresses, by that of its first tensor."""
        self._static_count = 0
        self._seen: dict[tuple[int, ...], bool] = {}
        """Whether a set may have a graph, by its addresses."""
        self._lock = threading.Lock()

    def have(self, weights: Sequence[Tensor]) -> bool:
        """Whether these weights are one of the sets."""
        known = self._static.get(weights[0].data_ptr())
        return known is not None and any(is_at([*weights]) for is_at in known)

    def take(self, weights: Sequence[Tensor]) -> bool:
        """Take in these weights if they come back, and there is room; whether they are in."""
        if self.have(weights):
            return True
        if self._static_count >= self._limit:
            return False
        addresses = tuple([weight.data_ptr() for weight in weights])
        with self._lock:
            is_first = not self._static and not self._seen
            may_be_taken = self._seen.pop(addresses, None)
            if is_first or may_be_taken:
                may_be_taken = _may_be_static(addresses)
                if may_be_taken and self._static_count < self._limit:
                    others = self._static.get(addresses[0], ())
                    self._static[addresses[0]] = (*others, cuda_graphs.address_check(addresses))
                    self._static_count += 1
                    return True
            self._seen[addresses] = may_be_taken is not False
            for oldest in [*self._seen][:-SEEN]:
                del self._seen[oldest]
            return False


def _may_be_static(addresses: Sequence[int]) -> bool:
    # What is in the memory of graphs may be overwritten by the next that is recorded.
    is_aligned = not any(address % ALIGNMENT for address in addresses)
    return is_aligned and not cuda_graphs.are_in_graphs(addresses)


def weight_sets(weights: Sequence[Tensor], limit: int | None) -> WeightSets | None:
    """Return the sets of ``weights`` and others of their kind, or None if none has a graph.

    Args:
        weights: The first that are called with.
        limit: As for :class:`WeightSets`; None if nobody asked for CUDA graphs.
    """
    if not limit or any(
        weight.device.type not in DEVICES or weight.layout is not torch.strided
        for weight in weights
    ):
        return None
    return WeightSets(limit)
