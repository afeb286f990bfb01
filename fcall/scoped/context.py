"""Which scopes a thread or task is in, and what differs in these."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

__all__ = ["count", "layer_over", "open_layers", "open_scopes", "opened", "set_scopes"]

open_scopes: ContextVar[tuple[Any, ...]] = ContextVar("fcall_scopes", default=())
"""The scopes, outermost first. Some may have been closed since, where this was inherited."""

open_layers: ContextVar[dict[int, dict[str, Any]]] = ContextVar("fcall_layers", default={})  # noqa: B039, never mutated
"""The layers of the innermost of them, for what reads a parameter."""

opened: set[int] = set()
"""The ids of the scopes that are open, anywhere."""


def count() -> int:
    """Return how many scopes are open, anywhere."""
    return len(opened)


def set_scopes(scopes: tuple[Any, ...]) -> None:
    """Set the scopes of this thread or task, outermost first."""
    open_scopes.set(scopes)
    open_layers.set(scopes[-1].layers if scopes else {})


def layer_over(thing: Any, key: str) -> dict[str, Any] | None:
    """Return the innermost layer over ``thing`` that has ``key``, for whoever asks."""
    for scope in reversed(open_scopes.get()):
        layer: dict[str, Any] | None = scope.layers.get(id(thing))
        if layer is not None and key in layer:
            return layer
    return None
