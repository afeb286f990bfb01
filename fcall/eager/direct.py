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


def read(stores: Sequence[Store], keys: Sequence[str]) -> list[Any]:
    """Return what stands in each store under its key, ``ABSENT`` for nothing."""
    try:
        return [*map(getitem, stores, keys)]  # no bytecode a value
    except KeyError:
        return [store.get(key, ABSENT) for store, key in zip(stores, keys)]


def write(stores: Iterable[Store], keys: Iterable[str], values: Iterable[Any]) -> None:
    """Write to each store. No signal is handled in between."""
    deque(map(setitem, stores, keys, values), maxlen=0)  # type: ignore[arg-type]


class Direct:
    """Values in the place of the module's own, until they are taken out."""

    def __init__(self, substitution: Substitution) -> None:
        self.substitution = substitution
        self._originals: list[Any] | None = None
        self._taken: list[Any] = []
        self._written = False
        self._in_order: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._thread = get_ident()

    @property
    def is_anothers(self) -> bool:
        """Whether another thread wrote the values, which this one inherited."""
        return self._thread != get_ident()

    @property
    def originals(self) -> list[Any]:
        """The module's own tensors in each place."""
        return self._originals or []

    def put_in(self, values: Sequence[Any]) -> None:
        """Write a value, or ``ABSENT``, for each place."""
        to = self.substitution
        self._taken, self._written = [], False
        self._cache = _torch.parametrization_cache()
        self._lists = rnn_lists(to.rnns)
        self._originals = read(to.stores, to.keys)
        if self._cache is not None:
            _torch.set_parametrization_cache({})
        write(to.stores, to.keys, values)
        self._written = True
        if any(map(is_, values, repeat(ABSENT))):
            delete_absent(to.stores, to.keys, values)

    def values_now(self) -> list[Any]:
        """Return for each place what stands there, ``ABSENT`` for nothing."""
        return read(self.substitution.stores, self.substitution.keys)

    def take_out(self) -> list[Any]:
        """Give the module its own back, and return for each place what stood there.

        If it is interrupted, it can be called again, and does what is left to do.
        """
        to, originals = self.substitution, self._originals
        if originals is None:
            return self._taken
        if self._written:
            self._taken, self._written = self.values_now(), False
        write(to.stores, to.keys, originals)
        if any(map(is_, originals, repeat(ABSENT))):
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
        self._taken = []


def delete_absent(stores: Sequence[Store], keys: Sequence[str], values: Sequence[Any]) -> None:
    """Delete what was written for ``ABSENT`` among ``values``."""
    for store, key, value in zip(stores, keys, values):
        if value is ABSENT and store.get(key, None) is ABSENT:
            del store[key]
