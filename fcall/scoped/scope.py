"""Scopes: putting values beside those of modules, for whoever is in one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from fcall.passes import are_same, put_in, read
from fcall.scoped.attributes import ScopedAttribute
from fcall.scoped.context import open_scopes, opened, set_scopes
from fcall.scoped.dicts import ScopedDict

__all__ = ["Scope", "ScopedCache"]

_lock = threading.RLock()
"""Held while attributes of modules are replaced. Reentrant, for a finalizer may open a scope."""

_attributes_of, _own_of, _scopes_of = map(attrgetter, ("__dict__", "own", "scopes"))


class Scope:
    """Values that stand in modules for whoever is in the scope.

    What is inherited of a scope, by a thread or task that was started in it, ends when it does.
    """

    __slots__ = ("_attributes", "_dicts", "_homes", "_names", "cache", "layers")

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}
        """What differs in here, by the id of a :class:`ScopedDict`, or of a module."""
        self.cache: tuple[ScopedCache | None, dict[Any, Any]] = (None, {})
        """The last of the caches of ``parametrize`` used in here, and what stands in for it."""
        self._dicts: list[ScopedDict] = []
        self._homes: list[dict[str, Any]] = []
        """For each of these the ``__dict__`` of the module that it stands in."""
        self._names: list[str] = []
        """And the key there."""
        self._attributes: list[ScopedAttribute] = []

    def open(self) -> None:
        """Enter the scope, in this thread or task."""
        opened.add(id(self))
        set_scopes((*[scope for scope in open_scopes.get() if id(scope) in opened], self))

    def close(self) -> None:
        """Leave it, be it the innermost or not, and be it open or not."""
        with _lock:
            self.layers.clear()
            self.cache = (None, {})
            opened.discard(id(self))
            set_scopes(tuple([scope for scope in open_scopes.get() if scope is not self]))
            if self._dicts:
                self._give_back_dicts()
            while self._attributes:
                attribute = self._attributes[-1]
                attribute.scopes.discard(id(self))
                if not attribute.scopes:
                    attribute.uninstall()
                self._attributes.pop()

    def _give_back_dicts(self) -> None:
        dicts, homes, names = self._dicts, self._homes, self._names
        mine = (id(self),)
        if [*map(_scopes_of, dicts)] == [mine] * len(dicts) and are_same(read(homes, names), dicts):
            put_in(homes, names, [*map(_own_of, dicts)])
        else:  # others are in a scope, or an interrupt came
            for scoped, home, name in zip(dicts, homes, names):
                scoped.scopes = tuple([number for number in scoped.scopes if (number,) != mine])
                if not scoped.scopes and home.get(name) is scoped:
                    home[name] = scoped.own
        self._dicts, self._homes, self._names = [], [], []

    def hide(self) -> tuple[Scope, ...]:
        """Leave it for a while, in this thread or task, and return what :meth:`show` needs."""
        before = open_scopes.get()
        set_scopes(tuple([scope for scope in before if scope is not self]))
        return before

    def show(self, before: tuple[Scope, ...]) -> None:
        """Enter it again."""
        set_scopes(before)

    def layer_of_dict(self, owner: nn.Module, name: str) -> dict[str, Any]:
        """Return a dict whose entries stand, in this scope, in ``owner.__dict__[name]``."""
        return self.layers_of_dicts([owner], [name])[0]

    def layers_of_dicts(
        self, owners: Sequence[nn.Module], names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Do as :meth:`layer_of_dict` for several different dicts, each an owner's and a name."""
        homes = [*map(_attributes_of, owners)]
        mine = (id(self),)
        with _lock:
            standing = read(homes, names)
            if {*map(type, standing)} == {dict}:
                dicts = ScopedDict.over(standing, mine)
            else:
                dicts = [
                    entries if type(entries) is ScopedDict else ScopedDict.over([entries], ())[0]
                    for entries in standing
                ]
                for scoped in dicts:
                    scoped.scopes = (*{*scoped.scopes, *mine},)
            # First, for a close after an interrupt.
            self._names += names
            self._homes += homes
            self._dicts += dicts
            put_in(homes, names, dicts)
            numbers = [*map(id, dicts)]
            fresh: list[dict[str, Any]] = [{} for _ in dicts]
            return [*map(self.layers.setdefault, numbers, fresh)]

    def layer_of_attributes(self, owner: nn.Module, kind: type, *names: str) -> dict[str, Any]:
        """Return a dict whose entries are, in this scope, attributes of ``owner``.

        Args:
            owner: An instance of ``kind``.
            kind: The class in which the attributes are to be defined.
            names: Those that may be in the dict. ``kind`` keeps no values for them itself.
        """
        with _lock:
            for name in names:
                attribute = vars(kind).get(name)
                if not isinstance(attribute, ScopedAttribute):
                    attribute = ScopedAttribute(kind, name)
                self._attributes.append(attribute)
                attribute.scopes.add(id(self))
                attribute.install()
            return self.layers.setdefault(id(owner), {})


class ScopedCache(dict[Any, Any]):
    """The cache of ``torch.nn.utils.parametrize``, with one of its own for each scope."""

    def __init__(self, own: dict[Any, Any]) -> None:
        super().__init__()
        self.own = own

    def _seen(self) -> dict[Any, Any]:
        for scope in reversed(open_scopes.get()):
            if id(scope) in opened:  # or it was inherited by a thread that outlives it
                if scope.cache[0] is not self:
                    scope.cache = (self, {})
                seen: dict[Any, Any] = scope.cache[1]
                return seen
        return self.own

    def get(self, key: Any, default: Any = None) -> Any:
        return self._seen().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        return self._seen()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._seen()[key] = value


def _forget_lock() -> None:
    """After a fork the thread that held it may be gone."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
