"""One eager call: swap the values in, call, swap them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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

__all__ = ["run"]


def run(
    substitution: Substitution,
    values: Sequence[Any],
    call: Callable[[], Any],
    changed: dict[int, Any],
) -> Any:
    """Return ``call()``, made while ``values`` stand in the module.

    Args:
        substitution: Where the values go. The module is mutated during the call only.
        values: The given values.
        call: Calls the module.
        changed: Filled with what the module reassigned, by the numbers of the values; also when
            ``call`` raises.
    """
    originals: list[Any] = []
    orders = _key_orders(substitution)
    lists = rnn_lists(substitution.rnns)
    try:
        swap_in(substitution.entries, [values[i] for i in substitution.sources], originals)
        with _torch.separate_parametrization_cache():
            return call()
    finally:
        after = swap_out(substitution.entries, originals)
        put_back_rnn_lists(lists)
        _put_back_key_orders(orders)
        changed.update(reassigned(substitution, values, after))


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
