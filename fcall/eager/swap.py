"""Substitution in the live module: values in, then out again, and nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fcall import _torch
from fcall.substitution import (
    Substitution,
    put_back_rnn_lists,
    reassigned,
    rnn_lists,
    stores_of,
    swap_in,
    swap_out,
)

__all__ = ["Swap"]


class Swap:
    """A context in which the given values stand in the module. It is mutated until then.

    Under Dynamo it is traced as a part of the caller's graph.
    """

    def __init__(self, substitution: Substitution, values: Sequence[Any]) -> None:
        self.substitution = substitution
        self.values = values
        self.changed: dict[int, Any] = {}
        """What the module reassigned, by the numbers of the values; known when the context ends."""
        self._originals: list[Any] = []
        self._orders: list[tuple[dict[str, Any], list[str]]] = []
        self._cache: Any = None

    def __enter__(self) -> Swap:
        if not torch.compiler.is_dynamo_compiling():
            self._orders = _key_orders(self.substitution)
            self._cache = _torch.set_parametrization_cache({})
        self._lists = rnn_lists(self.substitution.rnns)
        try:
            values = [self.values[i] for i in self.substitution.sources]
            swap_in(self.substitution.entries, values, self._originals)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        after = swap_out(self.substitution.entries, self._originals)
        put_back_rnn_lists(self._lists)
        if not torch.compiler.is_dynamo_compiling():
            _torch.set_parametrization_cache(self._cache)
            _put_back_key_orders(self._orders)
        self.changed = reassigned(self.substitution, self.values, after)


def _key_orders(substitution: Substitution) -> list[tuple[dict[str, Any], list[str]]]:
    stores = {id(store): store for store in stores_of(substitution.entries)}
    return [(store, list(store)) for store in stores.values()]


def _put_back_key_orders(orders: list[tuple[dict[str, Any], list[str]]]) -> None:
    """Undo what deleting and registering again does: an optimizer counts parameters by order."""
    for store, order in orders:
        if list(store) != order:
            entries = dict(store)
            store.clear()
            for key in (*order, *entries):
                if key in entries:
                    store[key] = entries[key]
