"""Which kind of swap a call needs: whether anybody else could look at the module meanwhile."""

from __future__ import annotations

import _thread
import threading
from typing import Any

from fcall import scoped
from fcall.eager.beside import Beside
from fcall.eager.direct import Direct
from fcall.eager.swap import Swap
from fcall.substitution import Substitution

__all__ = ["is_alone", "new_swap"]

BYSTANDERS = {
    ("tqdm._monitor", "TMonitor"),  # starts with the first bar, as Inductor shows one, and stays
    ("IPython.core.history", "HistorySavingThread"),
    ("ipykernel.heartbeat", "Heartbeat"),
}
"""Classes of threads that never look at a module."""


def others_may_look() -> bool:
    """Whether a thread lives that could. If none does, only this one can start some."""
    count, me = _thread._count(), threading.current_thread()
    for thread in threading.enumerate():
        if thread is not me:
            kind = type(thread)
            # Most are of the first kind, and to ask for names takes longer.
            if kind is threading.Thread or (kind.__module__, kind.__name__) not in BYSTANDERS:
                return True
            count -= 1
    return bool(count)  # the main thread does not count, nor do those that Python does not know


def is_alone() -> bool:
    """Whether this thread alone can look at modules, until it starts another one."""
    return not scoped.opened and (not _thread._count() or not others_may_look())


def new_swap(substitution: Substitution, values: tuple[Any, ...], *, alone: bool) -> Swap:
    """Return the context in which values stand in the module.

    Args:
        substitution: Where the values go.
        values: The given values.
        alone: Whether they may be written into the module itself: what :func:`is_alone` said
            before the module was looked at. Never for a block of the user's: blocks may be left in
            another order than they were entered, by generators or tasks that take turns.
    """
    return Direct(substitution, values) if alone else Beside(substitution, values)
