"""Scopes: putting values beside those of modules, for whoever is in one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from torch import nn

from fcall import _torch
from fcall.scoped.attributes import ScopedAttribute
from fcall.scoped.context import open_scopes, opened
from fcall.scoped.dicts import Installed, ScopedDict

__all__ = ["Scope", "ScopedCache"]

_lock = threading.RLock()
"""Held while attributes of modules are replaced. Reentrant, for a finalizer may open a scope."""

_CacheOfScope = tuple["ScopedCache | None", dict[Any, Any]]

_NO_CACHE: _CacheOfScope = (None, {})


class Scope(dict[int, dict[str, Any]]):
    """Values that stand in modules for whoever is in the scope.

    It holds what differs in it: layers, by the id of a :class:`ScopedDict`, or of a module. What is
    inherited of a scope, by a thread or task that was started in it, ends when it does.
    """

    __slots__ = ("_attributes", "_installed", "_mine", "cache")

    def __init__(self) -> None:
        self.cache = _NO_CACHE
        """The last of the caches of ``parametrize`` used in here, and what stands in for it."""
        self._mine = (id(self),)
        self._installed: list[Installed] = []
        self._attributes: list[ScopedAttribute] = []

    def open(self) -> None:
        """Enter the scope, in this thread or task."""
        with _lock:
            opened.add(id(self))
            around = open_scopes.get()
            if around:
                around = tuple([scope for scope in around if id(scope) in opened])
            open_scopes.set((*around, self))
            # Also where it is not used: it may be, in the scope.
            cache = _torch.parametrization_cache(if_unused=True)
            if cache is not None and type(cache) is not ScopedCache:
                _torch.set_parametrization_cache(ScopedCache(cache))

    def close(self) -> None:
        """Leave it, be it the innermost or not, and be it open or not."""
        with _lock:
            self.clear()
            self.cache = _NO_CACHE
            opened.discard(id(self))
            self.hide()
            if self._installed:
                self._give_back_dicts()
            while self._attributes:
                attribute = self._attributes[-1]
                attribute.scopes.discard(id(self))
                if not attribute.scopes:
                    attribute.uninstall()
                self._attributes.pop()
            if not opened:
                cache = _torch.parametrization_cache(if_unused=True)
                if type(cache) is ScopedCache:
                    _torch.set_parametrization_cache(cache.own)

    def _give_back_dicts(self) -> None:
        if not ScopedDict.uninstall(self._installed, self._mine):
            # Others are in a scope, or an interrupt came.
            for home, name, scoped in self._installed:
                scoped.scopes = tuple([n for n in scoped.scopes if (n,) != self._mine])
                if not scoped.scopes and home.get(name) is scoped:
                    home[name] = scoped.own
        self._installed = []

    def hide(self) -> tuple[Scope, ...]:
        """Leave it for a while, in this thread or task, and return what :meth:`show` needs."""
        before = open_scopes.get()
        if before and before[-1] is self:  # as ever, but for generators and tasks
            open_scopes.set(before[:-1])
        else:
            open_scopes.set(tuple([scope for scope in before if scope is not self]))
        return before

    def show(self, before: tuple[Scope, ...]) -> None:
        """Enter it again."""
        open_scopes.set(before)

    def layer_of_dict(self, owner: nn.Module, name: str) -> dict[str, Any]:
        """Return a dict whose entries stand, in this scope, in ``owner.__dict__[name]``."""
        return self.layers_of_dicts([owner], [(0, name)], [0])[0]

    def layers_of_dicts(
        self,
        owners: Sequence[nn.Module],
        groups: Sequence[tuple[int, str]],
        group_of_each: Sequence[int],
    ) -> list[dict[str, Any]]:
        """Do as :meth:`layer_of_dict` for different dicts, and return a layer for each place.

        Args:
            owners: The modules.
            groups: For each dict the number of its owner, and its name there.
            group_of_each: For each place the number of its dict.
        """
        with _lock:
            of_each = ScopedDict.install(
                owners, groups, group_of_each, self._mine, self, self._installed
            )
            if of_each is None:  # some stand there already, or are not plain
                layers = [self._layer_over(vars(owners[number]), name) for number, name in groups]
                of_each = [*map(layers.__getitem__, group_of_each)]
            return of_each

    def _layer_over(self, home: dict[str, Any], name: str) -> dict[str, Any]:
        entries = home[name]
        scoped = entries if type(entries) is ScopedDict else ScopedDict.over(entries)
        self._installed.append((home, name, scoped))  # first, for a close after an interrupt
        scoped.scopes = (*{*scoped.scopes, *self._mine},)
        home[name] = scoped
        return self.setdefault(id(scoped), {})

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
            return self.setdefault(id(owner), {})


class ScopedCache(dict[Any, Any]):
    """The cache of ``torch.nn.utils.parametrize``, with one of its own for each scope."""

    __slots__ = ("own",)

    def __init__(self, own: dict[Any, Any]) -> None:
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
