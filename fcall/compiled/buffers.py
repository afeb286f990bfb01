"""Memory of a compiled call's own, to which weights are copied: always at the same addresses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fcall._torch import cuda_graphs

__all__ = ["BufferPool", "can_be_copied"]

KEPT = 8
"""How many buffers one thread keeps. A call that finds all of them in use reads the weights where
they are."""

ALIGNMENT = 256
"""Bytes, as CUDA's allocator has it."""


class Buffers:
    """Tensors like those of one set of weights, in one piece of memory."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        spans = [_span(weight) for weight in weights]
        offsets = [0]
        for span in spans:
            offsets.append(offsets[-1] + -(-span // ALIGNMENT) * ALIGNMENT)
        with torch.inference_mode(False), torch.no_grad():
            storage = torch.UntypedStorage(offsets[-1], device=weights[0].device)
            self.tensors = tuple(
                # Not a view: a view's gradients, and its version, are those of what it shows.
                torch.empty(0, dtype=weight.dtype, device=weight.device)
                .set_(storage, offset // weight.itemsize, weight.shape, weight.stride())
                .requires_grad_(weight.requires_grad)
                for weight, offset in zip(weights, offsets)
            )
        by_dtype: dict[torch.dtype, list[int]] = {}
        for number, weight in enumerate(weights):
            by_dtype.setdefault(weight.dtype, []).append(number)
        self._groups = [([self.tensors[i] for i in of], of) for of in by_dtype.values()]
        self._users = cuda_graphs.storage_users(storage)
        self._alone = self._users()

    def are_free(self) -> bool:
        """Whether nobody else holds a tensor in here: an output, or a graph to be run backward."""
        return self._users() <= self._alone

    def filled(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the buffers with the values of ``weights``, to which gradients flow."""
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            copies: tuple[Tensor, ...] = _Copy.apply(self, *weights)
            return copies
        self.fill(weights)
        return self.tensors

    def fill(self, weights: Sequence[Tensor]) -> None:
        """Copy ``weights``, those of one dtype in one kernel."""
        with torch.no_grad():
            for own, numbers in self._groups:
                cuda_graphs.copy_all(own, [weights[i] for i in numbers])


class _Copy(torch.autograd.Function):
    """The identity, with its outputs in buffers."""

    @staticmethod
    def forward(ctx: Any, buffers: Buffers, *weights: Tensor) -> tuple[Tensor, ...]:
        buffers.fill(weights)
        copies = tuple([own.detach() for own in buffers.tensors])
        given = zip(weights, copies)
        ctx.mark_non_differentiable(*[copy for weight, copy in given if not weight.requires_grad])
        ctx.set_materialize_grads(False)
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *grads


class BufferPool(threading.local):
    """The buffers of each thread, for weights of one kind each.

    They are used again, once nobody reads what is in them. One thread's calls follow one another on
    a stream, so that a copy waits for the kernels of the call before.
    """

    def __init__(self) -> None:
        self._buffers: list[Buffers] = []

    def call(
        self,
        run: Callable[[tuple[Tensor, ...]], Any],
        weights: tuple[Tensor, ...],
        written: Iterable[int] | None,
    ) -> Any:
        """Return ``run(copies)``, and write to ``weights`` what it writes to the copies.

        Args:
            run: What to call.
            weights: What is copied.
            written: The numbers of those that it writes to; None if that is not known.
        """
        buffers = self._free(weights)
        if buffers is None:
            return run(weights)
        copies = buffers.filled(weights)
        result = run(copies)
        if written is None:
            pairs = enumerate(zip(weights, copies))
            written = [i for i, (weight, copy) in pairs if not torch.equal(weight, copy)]
        for i in written:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not weights[i].is_leaf):
                weights[i].copy_(copies[i])
        return result

    def _free(self, weights: tuple[Tensor, ...]) -> Buffers | None:
        for buffers in self._buffers:
            if buffers.are_free():
                return buffers
        if len(self._buffers) == KEPT:
            return None
        self._buffers.append(Buffers(weights))
        return self._buffers[-1]


def can_be_copied(weights: Sequence[Tensor]) -> bool:
    """Whether buffers can be made that are like ``weights``: on one device, each in memory."""
    return len({weight.device for weight in weights}) == 1 and all(
        weight.layout is torch.strided
        and not weight.is_conj()
        and not weight.is_neg()
        and not cuda_graphs.overlaps_itself(weight)
        for weight in weights
    )


def _span(weight: Tensor) -> int:
    """Return how many bytes there are from its first element to its last."""
    if not weight.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride()))
    return (last + 1) * weight.itemsize
