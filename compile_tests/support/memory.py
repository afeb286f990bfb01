"""How much memory tensors take: what lives, and the most that lived in a call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of ``tensors`` that are not on meta."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # those of vmap have no storage
    storages = [t.untyped_storage() for t in tensors if not t.is_meta and not wrapped(t)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def live_tensors() -> list[Tensor]:
    """Return all tensors with a storage that Python can reach."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    return [t for t in tensors if t.layout is torch.strided and torch._C._has_storage(t)]


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can reach."""
    return size_of(live_tensors())


class _Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are made within it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.before: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        old = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in old:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes of new tensors that lived at once after an operation of ``call``."""
    with _Peak() as mode:
        call()
    return mode.peak
