"""Substitution in the live module: values in, then out again, and nothing left behind.

:class:`Swap` is what all swaps have in common. Where values stand is a matter of its two kinds,
:class:`fcall.eager.direct.Direct` and :class:`fcall.eager.beside.Beside`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from fcall.passes import are_same
from fcall.substitution import Substitution, reassigned

__all__ = ["Swap", "active", "is_ours", "ours"]

_active: ContextVar[tuple[Swap, ...]] = ContextVar("fcall_active", default=())


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


class Swap(ABC):
    """A context in which the given values stand in the module.

    Args:
        substitution: Where the values go.
        values: The given values.
    """

    # Defaults on the class: to set them for each call would take a good part of its time.
    changed: Mapping[int, Any] = MappingProxyType({})
    """What the module reassigned, by the numbers of the values; known when the context ends."""
    at_end: Sequence[Callable[[], None]] = ()
    """What is to be done when the context ends, before values are taken out."""
    given: Sequence[Any] = ()
    """For each place the value that was written first."""
    in_force = False
    is_over = False
    _taken: Sequence[Any] = ()
    """For each place the value that was taken out, once that was done."""

    def __init__(self, substitution: Substitution, values: tuple[Any, ...]) -> None:
        self.substitution = substitution
        self.values = values

    @abstractmethod
    def _put_in(self, values: Sequence[Any], originals: Sequence[Any] | None = None) -> None:
        """Have a value, or ``ABSENT``, stand in each place."""

    @abstractmethod
    def _read(self) -> Sequence[Any]:
        """Return for each place what stands there, ``ABSENT`` for nothing."""

    @abstractmethod
    def _take_out(self) -> Sequence[Any]:
        """Give the module back its own, and return for each place what stood there.

        If it is interrupted, it can be called again, and does what is left to do; where nothing was
        put in, there is nothing to do.
        """

    @abstractmethod
    def _hide(self) -> Callable[[], Any]:
        """Show this thread or task the module's own for a while; return how to undo that."""

    def __enter__(self) -> Swap:
        self.put_in(self.substitution.spread(self.values))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the context, if it has not ended."""
        if self.is_over:
            return
        try:
            while self.at_end:
                do, *self.at_end = self.at_end
                do()
        finally:
            after = self.take_out()  # the same again if it is called again
            if after is not self.given and not are_same(after, self.given):
                self.changed = reassigned(self.substitution, self.values, after)
            self.is_over = True
            # A context that was taken along may keep this.
            self.values = self.given = self._taken = ()

    def values_now(self) -> Sequence[Any]:
        """Return for each place what stands there, ``ABSENT`` for nothing. Not to be mutated."""
        now = self._read()
        # Many may be kept, one for each checkpoint.
        return self.given if are_same(now, self.given) else now

    def put_in(self, values: Sequence[Any], originals: Sequence[Any] | None = None) -> None:
        """Have for each place a value, or ``ABSENT``, stand there.

        Args:
            values: The values.
            originals: What stands there now, where that is known and nothing is ``ABSENT``.
        """
        self.given = values
        try:
            self._put_in(values, originals)
            self.in_force = True
            around = _active.get()
            _active.set((*around, self) if around else (self,))
        except BaseException:
            self.take_out()
            raise

    def take_out(self) -> Sequence[Any]:
        """Give the module back its own, and return for each place what stood there."""
        try:
            return self._take_out()
        finally:
            if self.in_force:
                self.in_force = False
                swaps = _active.get()
                if swaps and swaps[-1] is self:  # as ever, but for generators and tasks
                    _active.set(swaps[:-1])
                else:
                    _active.set(tuple([swap for swap in swaps if swap is not self]))

    def suspend(self) -> Callable[[], None]:
        """Take it out of force for this thread or task, and return how to undo that."""
        before = _active.get()
        _active.set(tuple(swap for swap in before if swap is not self))
        put_back = self._hide()

        def resume() -> None:
            put_back()
            _active.set(before)

        return resume
