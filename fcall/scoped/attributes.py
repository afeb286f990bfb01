"""Attributes that modules keep in their ``__dict__``, and that differ by scope."""

from __future__ import annotations

from typing import Any

from fcall.passes import ABSENT
from fcall.scoped.context import layer_over

__all__ = ["ScopedAttribute"]


class ScopedAttribute:
    """Stands in a class for an attribute that instances keep in their ``__dict__``."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name
        self.of_class = vars(kind).get(name, ABSENT)
        self.scopes: set[int] = set()

    def install(self) -> None:
        setattr(self.kind, self.name, self)

    def uninstall(self) -> None:
        if vars(self.kind).get(self.name) is not self:
            return
        if self.of_class is ABSENT:
            delattr(self.kind, self.name)
        else:
            setattr(self.kind, self.name, self.of_class)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is not None:
            layer = layer_over(owner, self.name)
            value = (owner.__dict__ if layer is None else layer).get(self.name, ABSENT)
            if value is not ABSENT:
                return value
        if self.of_class is ABSENT:
            return getattr(super(self.kind, kind if owner is None else owner), self.name)
        bind = getattr(type(self.of_class), "__get__", None)
        return self.of_class if bind is None else bind(self.of_class, owner, kind)

    def __set__(self, owner: Any, value: Any) -> None:
        layer = layer_over(owner, self.name)
        (owner.__dict__ if layer is None else layer)[self.name] = value

    def __delete__(self, owner: Any) -> None:
        layer = layer_over(owner, self.name)
        if layer is not None and layer[self.name] is not ABSENT:
            layer[self.name] = ABSENT
        elif layer is None and self.name in owner.__dict__:
            del owner.__dict__[self.name]
        else:
            raise AttributeError(self.name)
