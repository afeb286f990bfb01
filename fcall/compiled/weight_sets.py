"""Sets of weights, where compiled code is recorded as CUDA graphs.

A CUDA graph reads what it is given at the addresses at which it was recorded. torch has two ways to
call one with other tensors. It copies them to where the graph reads, at each call, as it does with
inputs; or, if they are *static*, as the parameters of a module, it compares addresses, and records
another graph for each new set of them, without a bound.

Weights are static here. A set of weights, known by its addresses, may have a graph of its own,
which is replayed with no copy: the first, and others once they come back, up to a number. The
weights of all other calls are copied to buffers, which are one more set of addresses. So nothing
depends on which tensors these are: who is at a known address is read there, be it new, and who has
moved is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from fcall._torch import cuda_graphs
from fcall.compiled.buffers import BufferPool, can_be_copied

__all__ = ["STATIC_SETS", "WeightSets", "weight_sets"]

STATIC_SETS = 8
"""How many sets have graphs of their own, if nothing else is said."""

DEVICES = frozenset({"cuda"})
"""The kinds of devices on which Inductor records graphs."""

SEEN = 64
"""How many sets are remembered that have no graph of their own yet. The oldest goes first."""

ALIGNMENT = 16
"""Bytes. Kernels that were compiled for static inputs take it for granted."""


class WeightSets:
    """Decides, for one frame, where the graph of a call is to read its weights.

    Args:
        limit: How many sets may have graphs of their own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._static: dict[int, tuple[Callable[[list[Tensor]], bool], ...]] = {}
        """What knows a set by its addresses, by that of its first tensor."""
        self._static_count = 0
        self._seen: dict[tuple[int, ...], None] = {}
        self._pool = BufferPool()
        self._lock = threading.Lock()
        self.written: frozenset[int] | None = frozenset()
        """The weights that compiled graphs write to in place, by their numbers; None if nobody
        knows of one of them."""

    def call(
        self,
        run: Callable[[tuple[Tensor, ...]], Any],
        weights: tuple[Tensor, ...],
        *,
        is_one_graph: bool,
    ) -> Any:
        """Return ``run`` of ``weights``, or of copies that it cannot tell from them.

        Args:
            run: Calls what was compiled, or compiles it first.
            weights: The weights of the call. Written to as ``run`` writes to what it is given.
            is_one_graph: Whether ``run`` is a graph that :meth:`note_written` was told of.
        """
        if self._is_static([*weights]):
            return run(weights)
        return self._pool.call(run, weights, self.written if is_one_graph else None)

    def note_written(self, numbers: Iterable[int] | None) -> None:
        """Take note of which weights a graph writes to in place; None if nobody knows."""
        with self._lock:
            known = self.written
            if known is not None:
                self.written = None if numbers is None else known.union(numbers)

    def _is_static(self, weights: list[Tensor]) -> bool:
        known = self._static.get(weights[0].data_ptr(), ())
        return any(is_at(weights) for is_at in known) or (
            self._static_count < self._limit and self._is_new_static(weights)
        )

    def _is_new_static(self, weights: list[Tensor]) -> bool:
        addresses = tuple([weight.data_ptr() for weight in weights])
        if any(address % ALIGNMENT for address in addresses):
            return False
        with self._lock:
            is_back = addresses in self._seen or not (self._static or self._seen)
            self._seen.pop(addresses, None)
            if not is_back or self._static_count >= self._limit:
                self._seen[addresses] = None
                for oldest in [*self._seen][:-SEEN]:
                    del self._seen[oldest]
                return False
            others = self._static.get(addresses[0], ())
            self._static[addresses[0]] = (*others, cuda_graphs.address_check(addresses))
            self._static_count += 1
            return True


def weight_sets(weights: Sequence[Tensor], limit: int | None) -> WeightSets | None:
    """Return what decides for ``weights`` of this kind, or None where no graphs are recorded.

    Args:
        weights: The first that a frame is called with.
        limit: As for :class:`WeightSets`; None if nobody asked for CUDA graphs.
    """
    if limit is None or {weight.device.type for weight in weights} - DEVICES:
        return None
    return WeightSets(limit) if can_be_copied(weights) else None
