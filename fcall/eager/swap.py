"""Substitution in the live module: values in, then out again, and nothing left behind."""

from __future__ import annotations

import _thread
import functools
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from fcall import scoped
from fcall.eager.beside import Beside
from fcall.eager.direct import Direct
from fcall.identity import identities
from fcall.substitution import Substitution, reassigned

__all__ = ["Swap", "active", "is_alone", "is_ours", "ours"]


_active: ContextVar[tuple[Swap, ...]] = ContextVar("fcall_active", default=())


BYSTANDERS = {
    ("tqdm._monitor", "TMonitor"),  # starts with the first bar, as Inductor shows one, and stays
    ("IPython.core.history", "HistorySavingThread"),
    ("ipykernel.heartbeat", "Heartbeat"),
}
"""Classes of threads that never look at a module."""


def others_may_look() -> bool:
    """Whether a thread lives that could. If none does, only this one can start some."""
    count = _thread._count()
    if not count:
        return False
    me = threading.current_thread()
    others = [type(thread) for thread in threading.enumerate() if thread is not me]
    known = {(kind.__module__, kind.__name__) for kind in others} <= BYSTANDERS
    return not known or len(others) != count  # the main thread does not count


def is_alone() -> bool:
    """Whether this thread alone can look at modules, until it starts another one."""
    return not scoped.count() and not others_may_look()


def active() -> list[Swap]:
    """Return the swaps in force for this thread or task, outermost first."""
    return [swap for swap in _active.get() if swap.in_force]


def ours(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Mark what wraps a function of torch or Python, to look at what is in force."""
    wrapper.fcall_active = active  # type: ignore[attr-defined]
    return wrapper


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is marked by :func:`ours`."""
    # By identity, for two copies of fcall in one process each have to note their own.
    return getattr(function, "fcall_active", None) is active


class Swap:
    """A context in which the given values stand in the module.

    Args:
        substitution: Where the values go.
        values: The given values.
        alone: Whether the values may be written into the module itself: what :func:`is_alone` said
            before the module was looked at. Never for a block of the user's: blocks may be left in
            another order than they were entered, by generators or tasks that take turns.
        originals: The module's own tensors in each place, where they are known.
    """

    __slots__ = (
        "_place",
        "at_end",
        "changed",
        "given",
        "in_force",
        "is_over",
        "substitution",
        "values",
    )

    def __init__(
        self,
        substitution: Substitution,
        values: tuple[Any, ...],
        *,
        alone: bool,
        originals: Sequence[Any] | None = None,
    ) -> None:
        self.substitution = substitution
        self.values = values
        self.changed: dict[int, Any] = {}
        """What the module reassigned, by the numbers of the values; known when the context ends."""
        self.given: tuple[Any, ...] = ()
        """For each place the value that was written first."""
        self.at_end: list[Callable[[], None]] = []
        """What is to be done when the context ends, before values are taken out."""
        self.in_force = False
        self.is_over = False
        self._place = Direct(substitution, originals) if alone else Beside(substitution)

    def __enter__(self) -> Swap:
        self.given = self.substitution.spread(self.values)
        self.put_in(self.given)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the context, if it has not ended."""
        if self.is_over:
            return
        try:
            while self.at_end:
                self.at_end.pop(0)()
        finally:
            after = self.take_out()  # the same again if it is called again
            if identities(after) != identities(self.given):
                self.changed = reassigned(self.substitution, self.values, after)
            self.is_over = True
            # A context that was taken along may keep this.
            self.values, self.given = (), ()
            self._place.forget()

    def values_now(self) -> Sequence[Any]:
        """Return for each place what stands there, ``ABSENT`` for nothing. Not to be mutated."""
        now = self._place.values_now()
        # Many may be kept, one for each checkpoint.
        return self.given if identities(now) == identities(self.given) else now

    def put_in(self, values: Sequence[Any]) -> None:
        """Have for each place a value, or ``ABSENT``, stand there."""
        try:
            self._place.put_in(values)
            self.in_force = True
            _active.set((*active(), self))
        except BaseException:
            self.take_out()
            raise

    def take_out(self) -> tuple[Any, ...]:
        """Give the module back its own, and return for each place what stood there."""
        try:
            return self._place.take_out()
        finally:
            if self.in_force:
                self.in_force = False
                _active.set(tuple([swap for swap in _active.get() if swap is not self]))

    def suspend(self) -> Callable[[], None]:
        """Take it out of force for this thread or task, and return how to undo that."""
        before = _active.get()
        _active.set(tuple(swap for swap in before if swap is not self))
        put_back = self._hide()

        def resume() -> None:
            put_back()
            _active.set(before)

        return resume

    def _hide(self) -> Callable[[], Any]:
        if isinstance(self._place, Beside):
            return self._place.hide()
        if self._place.is_anothers:  # which needs it
            own = Beside(self.substitution)
            own.put_in(self._place.originals)
            return own.take_out
        return functools.partial(self._place.put_in, self._place.take_out())
