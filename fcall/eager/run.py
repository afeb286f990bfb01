"""One eager call: swap the values in, call, swap them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fcall.substitution import (
    Substitution,
    put_back_rnn_lists,
    reassigned,
    rnn_lists,
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
    lists = rnn_lists(substitution.rnns)
    try:
        swap_in(substitution.entries, [values[i] for i in substitution.sources], originals)
        return call()
    finally:
        after = swap_out(substitution.entries, originals)
        put_back_rnn_lists(lists)
        changed.update(reassigned(substitution, values, after))
