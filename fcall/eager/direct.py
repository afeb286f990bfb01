"""Values in the live module's own dicts, where whoever holds the module sees them.

The fastest way, for when nobody else can look: in a program with one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import getitem, is_, setitem
from threading import get_ident
from typing import Any

from fcall import _torch
from fcall.scoped import ABSENT
from fcall.substitution import Store, Substitution, put_back_rnn_lists, rnn_lists

__all__ = ["Direct", "delete_absent", "read", "write"]


def read(stores: Sequence[Store], keys: Sequence[str]) -> tuple[Any, ...]:
    """Return what stands in each store under its key, ``ABSENT`` for nothing."""
    try:
        return tuple(map(getitem, stores, keys))  # no bytecode a value
    except KeyError:
        return tuple([store.get(key, ABSENT) for store, key in zip(stores, keys)])


def write(stores: Iterable[Store], keys: Iterable[str], values: Iterable[Any]) -> None:
    """Write to each store. No signal is handled in between."""
    deque(map(setitem, stores, keys, values), maxlen=0)  # type: ignore[arg-type]


class Direct:
    """Values in the place of the module's own, until they are taken out.

    Args:
        substitution: Where they go.
        originals: The module's own tensors in each place, if they are known to stand there when
            values are first put in.
    """

    __slots__ = (
        "_cache",
        "_gaps",
        "_in_order",
        "_known",
        "_lists",
        "_originals",
        "_taken",
        "_thread",
        "_written",
        "substitution",
    )

    def __init__(self, substitution: Substitution, originals: Sequence[Any] | None = None) -> None:
        self.substitution = substitution
        self._known = originals
        self._originals: Sequence[Any] | None = None
        self._taken: tuple[Any, ...] = ()
        self._written = False
        self._in_order: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._thread = get_ident()

    @property
    def is_anothers(self) -> bool:
        """Whether another thread wrote the values, which this one inherited."""
        return self._thread != get_ident()

    @property
    def originals(self) -> Sequence[Any]:
        """The module's own tensors in each place."""
        return self._originals or []

    def put_in(self, values: Sequence[Any]) -> None:
        """Write a value, or ``ABSENT``, for each place."""
        to, originals = self.substitution, self._known
        self._taken, self._written = (), False
        self._cache = _torch.parametrization_cache()
        self._lists = rnn_lists(to.rnns) if to.rnns else None
        self._gaps = originals is None  # what is known has none, nor has what is given first
        self._known = None
        self._originals = read(to.stores, to.keys) if originals is None else originals
        if self._cache is not None:
            _torch.set_parametrization_cache({})
        write(to.stores, to.keys, values)
        self._written = True
        if self._gaps:
            delete_absent(to.stores, to.keys, values)

    def values_now(self) -> tuple[Any, ...]:
        """Return for each place what stands there, ``ABSENT`` for nothing."""
        return read(self.substitution.stores, self.substitution.keys)

    def take_out(self) -> tuple[Any, ...]:
        """Give the module its own back, and return for each place what stood there.

        If it is interrupted, it can be called again, and does what is left to do.
        """
        to, originals = self.substitution, self._originals
        if originals is None:
            return self._taken
        if self._written:
            self._taken, self._written = self.values_now(), False
        write(to.stores, to.keys, originals)
        if self._gaps:
            delete_absent(to.stores, to.keys, originals)
        if self._lists:
            put_back_rnn_lists(self._lists)
        if self._cache is not None:
            _torch.set_parametrization_cache(self._cache)
        if self._in_order or [*chain.from_iterable(to.dicts)] != to.order:
            self._put_back_order()
        self._originals = None
        return self._taken

    def _put_back_order(self) -> None:
        """Undo what deleting and registering again does: an optimizer counts by order."""
        to = self.substitution
        if not self._in_order:
            order = iter(to.order)
            keys_of = [[next(order) for _ in range(count)] for count in to.counts]
            self._in_order = [
                (store, {key: store[key] for key in (*keys, *store) if key in store})
                for store, keys in zip(to.dicts, keys_of)
            ]
        for store, entries in self._in_order:
            if list(store) != list(entries):
                store.clear()
                store.update(entries)
        self._in_order = []

    def forget(self) -> None:
        """Keep no tensor alive."""
        self._taken, self._known = (), None


def delete_absent(stores: Sequence[Store], keys: Sequence[str], values: Sequence[Any]) -> None:
    """Delete what was written for ``ABSENT`` among ``values``."""
    if any(map(is_, values, repeat(ABSENT))):
        for store, key, value in zip(stores, keys, values):
            if value is ABSENT and store.get(key, None) is ABSENT:
                del store[key]
