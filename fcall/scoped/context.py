"""Which scopes a thread or task is in, and what differs in these."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

__all__ = ["layer_over", "open_scopes", "opened"]

open_scopes: ContextVar[tuple[Any, ...]] = ContextVar("fcall_scopes", default=())
"""The scopes, outermost first. Some may have been closed since, where this was inherited."""

opened: set[int] = set()
"""The ids of the scopes that are open, anywhere."""


def layer_over(thing: Any, key: str) -> dict[str, Any] | None:
    """Return the innermost layer over ``thing`` that has ``key``, for whoever asks."""
    for scope in reversed(open_scopes.get()):
        layer: dict[str, Any] | None = scope.get(id(thing))
        if layer is not None and key in layer:
            return layer
    return None
