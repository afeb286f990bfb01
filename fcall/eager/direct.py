"""Values in the live module's own dicts, where whoever holds the module sees them.

The fastest way, for when nobody else can look: in a program with one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

from torch import nn

from fcall import _torch
from fcall.eager.beside import Beside
from fcall.eager.swap import Swap
from fcall.passes import exchange, have_keys, put_back, put_in, read
from fcall.substitution import delete_absent, put_back_rnn_lists, rnn_lists

__all__ = ["Direct"]


class Direct(Swap):
    """Values in the place of the module's own, until they are taken out."""

    _cache: dict[Any, Any] | None = None
    _in_order: Sequence[tuple[dict[str, Any], dict[str, Any]]] = ()
    _is_whole = False
    """Whether no place was empty before, and none is given ``ABSENT``."""
    _lists: Sequence[tuple[nn.RNNBase, Any, Any]] = ()
    _originals: Sequence[Any] | None = None
    _taken: list[Any]
    _thread = 0
    _written = False

    def _put_in(self, values: Sequence[Any], originals: Sequence[Any] | None = None) -> None:
        layout, _, stores, rnns, _, _, _ = self.substitution  # as quick as to ask for one of them
        keys = layout.keys
        cache = self._cache = _torch.parametrization_cache()
        if rnns:
            self._lists = rnn_lists(rnns)
        self._thread, self._taken, self._is_whole = get_ident(), [], originals is not None
        self._originals = read(stores, keys) if originals is None else originals
        if cache is not None:
            _torch.set_parametrization_cache({})
        put_in(stores, keys, values)
        self._written = True
        if not self._is_whole:
            delete_absent(stores, keys, values)

    def _read(self) -> Sequence[Any]:
        return read(self.substitution.stores, self.substitution.layout.keys)

    def _take_out(self) -> Sequence[Any]:
        originals = self._originals
        if originals is None:
            return self._taken
        layout, _, stores, _, dicts, lengths, order = self.substitution
        taken, given, places = self._taken, self.given, layout.place_of_each
        after: Sequence[Any] = taken
        if (
            self._written
            and self._is_whole
            and put_back(
                stores, layout.keys, originals, given, taken, dicts, lengths, order, places
            )
        ):
            after = given
        else:
            self._put_back_whatever_was_done(originals)
        if self._lists:
            put_back_rnn_lists(self._lists)
        if self._cache is not None:
            _torch.set_parametrization_cache(self._cache)
        self._originals, self._written = None, False
        return after

    def _put_back_whatever_was_done(self, originals: Sequence[Any]) -> None:
        to, keys = self.substitution, self.substitution.layout.keys
        if self._written:
            exchange(to.stores, keys, originals, self._taken)
        else:  # putting values in was interrupted
            put_in(to.stores, keys, originals)
        if not self._is_whole:
            delete_absent(to.stores, keys, originals)
        if self._in_order or not have_keys(to.dicts, to.lengths, to.order):
            self._put_back_order()

    def _put_back_order(self) -> None:
        """Undo what deleting and registering again does: an optimizer counts by order."""
        to = self.substitution
        if not self._in_order:
            order = iter(to.order)
            keys_of = [[next(order) for _ in range(length)] for length in to.lengths]
            self._in_order = [
                (store, {key: store[key] for key in (*keys, *store) if key in store})
                for store, keys in zip(to.dicts, keys_of)
            ]
        for store, entries in self._in_order:
            if list(store) != list(entries):
                store.clear()
                store.update(entries)
        self._in_order = ()

    def _hide(self) -> Callable[[], Any]:
        if self._thread == get_ident():
            return functools.partial(self._put_in, self._take_out())
        # The thread that wrote the values needs them; this one only inherited them.
        own = Beside(self.substitution, ())
        own._put_in(self._originals or [])
        return own._take_out
