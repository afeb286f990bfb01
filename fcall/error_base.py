"""What all error classes have in common, and how an error leaves a traced function."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from fcall._torch import evaluated_while_tracing

__all__ = ["FcallError", "FcallWarning", "fail", "fail_while_tracing", "nearest"]


class FcallError(Exception):
    """Base class of the errors that fcall raises; never raised itself."""

    template = ""

    def __init__(self, *details: Any) -> None:
        self.details = details
        self.message = self.describe(*details)
        super().__init__(self.message)

    def describe(self, *details: Any) -> str:
        """Return the message."""
        return self.template.format(*details)

    def __str__(self) -> str:
        return self.message  # not ``args``: Dynamo adds its stack to them, KeyError quotes them

    def __reduce__(self) -> tuple[Any, ...]:
        return _named_class(type(self)), self.details


class FcallWarning(UserWarning):
    """fcall works, but not in the way it was meant to, for instance on an unknown torch."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question that proposes the nearest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def fail(error: type[FcallError], *details: Any) -> NoReturn:
    """Raise ``error(*details)``, also out of a function that ``torch.compile`` is tracing."""
    if torch.compiler.is_dynamo_compiling():
        fail_while_tracing(error, *details)
    raise error(*details)


@evaluated_while_tracing
def fail_while_tracing(error: type[FcallError], *details: Any) -> NoReturn:
    """Raise ``error(*details)`` in a way that Dynamo, which is running the caller, lets through."""
    raise _unwrapped(error)(*details)


def _unwrapped(error: type[FcallError]) -> type[FcallError]:
    """Return a subclass of ``error`` that leaves Dynamo as it is.

    Dynamo wraps what is raised while it traces into exceptions of its own, but for a few kinds, of
    which AssertionError is one.
    """
    namespace = {"__doc__": error.__doc__, "__module__": error.__module__}
    return type(error.__name__, (error, AssertionError), namespace)


def _named_class(error: type[FcallError]) -> type[FcallError]:
    """Return the class of this module that ``error`` is, or was made of by :func:`_unwrapped`."""
    return error.__mro__[1] if AssertionError in error.__bases__ else error
