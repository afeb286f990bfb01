"""Attributes of modules that differ by scope: by the thread, or the task, that looks.

Values written into a live module can be seen by all that hold it. Where others may look while they
stand there, the module's dicts are replaced by :class:`ScopedDict`, and the values are kept beside
them, in a :class:`Scope` that only the thread or the asyncio task that opened it can see, and what
these start. The dicts themselves, with the module's own tensors, stay as they are.

A scope is a value of a context variable. So tasks that take turns on one thread do not mix, and
scopes may be closed in another order than they were opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from fcall.passes import ABSENT

__all__ = ["Scope", "ScopedCache", "ScopedDict", "count", "own_dict", "shows_own"]

_open: ContextVar[tuple[Scope, ...]] = ContextVar("fcall_scopes", default=())
_lock = threading.RLock()
"""Held while attributes of modules are replaced. Reentrant, for a finalizer may open a scope."""
_opened: set[int] = set()
"""The ids of the scopes that are open, anywhere."""


def count() -> int:
    """Return how many scopes are open, anywhere."""
    return len(_opened)


class Scope:
    """Values that stand in modules for whoever is in the scope.

    What is inherited of a scope, by a thread or task that was started in it, ends when it does.
    """

    __slots__ = ("_attributes", "_dicts", "cache", "layers")

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}
        """What differs in here, by the id of a :class:`ScopedDict`, or of a module."""
        self.cache: tuple[ScopedCache | None, dict[Any, Any]] = (None, {})
        """The last of the caches of ``parametrize`` used in here, and what stands in for it."""
        self._dicts: list[tuple[nn.Module, str, ScopedDict]] = []
        self._attributes: list[_ScopedAttribute] = []

    def open(self) -> None:
        """Enter the scope, in this thread or task."""
        _opened.add(id(self))
        _open.set((*[scope for scope in _open.get() if id(scope) in _opened], self))

    def close(self) -> None:
        """Leave it, be it the innermost or not, and be it open or not."""
        with _lock:
            self.layers.clear()
            self.cache = (None, {})
            _opened.discard(id(self))
            _open.set(tuple([scope for scope in _open.get() if scope is not self]))
            number, dicts = id(self), self._dicts
            while dicts:
                owner, name, scoped = dicts[-1]
                scoped.scopes.discard(number)
                if not scoped.scopes:
                    entries = owner.__dict__
                    if entries.get(name) is scoped:
                        entries[name] = scoped.own
                dicts.pop()
            while self._attributes:
                attribute = self._attributes[-1]
                attribute.scopes.discard(id(self))
                if not attribute.scopes:
                    attribute.uninstall()
                self._attributes.pop()

    def hide(self) -> tuple[Scope, ...]:
        """Leave it for a while, in this thread or task, and return what :meth:`show` needs."""
        before = _open.get()
        _open.set(tuple(scope for scope in before if scope is not self))
        return before

    def show(self, before: tuple[Scope, ...]) -> None:
        """Enter it again."""
        _open.set(before)

    def layer_of_dict(self, owner: nn.Module, name: str) -> dict[str, Any]:
        """Return a dict whose entries stand, in this scope, in ``owner.__dict__[name]``."""
        return self.layers_of_dicts([(owner, name)])[0]

    def layers_of_dicts(self, places: Iterable[tuple[nn.Module, str]]) -> list[dict[str, Any]]:
        """Do as :meth:`layer_of_dict` for many owners and names."""
        number, layers, found = id(self), self.layers, []
        with _lock:
            for owner, name in places:
                entries = owner.__dict__
                scoped = entries[name]
                if type(scoped) is not ScopedDict:
                    own, scoped = scoped, ScopedDict(scoped)
                    scoped.own, scoped.scopes = own, set()
                self._dicts.append((owner, name, scoped))  # first, for a close after an interrupt
                scoped.scopes.add(number)
                entries[name] = scoped
                found.append(layers.setdefault(id(scoped), {}))
        return found

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
                if not isinstance(attribute, _ScopedAttribute):
                    attribute = _ScopedAttribute(kind, name)
                self._attributes.append(attribute)
                attribute.scopes.add(id(self))
                attribute.install()
            return self.layers.setdefault(id(owner), {})


def _layer(thing: Any, key: str) -> dict[str, Any] | None:
    """Return the innermost layer over ``thing`` that has ``key``, for whoever asks."""
    for scope in reversed(_open.get()):
        layer = scope.layers.get(id(thing))
        if layer is not None and key in layer:
            return layer
    return None


def own_dict(entries: Any) -> Any:
    """Return the dict that ``entries`` is for whoever asks, as plain as possible."""
    return entries.own if type(entries) is ScopedDict and shows_own(entries) else entries


def shows_own(entries: Any) -> bool:
    """Whether no scope of whoever asks has other values in ``entries``, a dict of a module."""
    return not any(id(entries) in scope.layers for scope in _open.get())


class ScopedDict(dict[str, Any]):
    """A dict of a module, with other values for those in a scope.

    Its storage as a plain dict, which C code may look at, has the module's own entries, too.
    """

    __slots__ = ("own", "scopes")
    own: dict[str, Any]
    """The module's own dict."""
    scopes: set[int]
    """The ids of the open scopes that have a layer."""

    # What reads a parameter calls the next two, so that they look at the innermost scope at once.

    def __getitem__(self, key: str) -> Any:
        try:
            value = _open.get()[-1].layers[id(self)][key]
        except (IndexError, KeyError):
            layer = _layer(self, key)
            value = (self.own if layer is None else layer).get(key, ABSENT)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        try:
            return _open.get()[-1].layers[id(self)][key] is not ABSENT  # type: ignore[index]
        except (IndexError, KeyError):
            layer = _layer(self, key)  # type: ignore[arg-type]
            return key in self.own if layer is None else layer.get(key) is not ABSENT  # type: ignore[call-overload]

    def get(self, key: str, default: Any = None) -> Any:
        layer = _layer(self, key)
        value = (self.own if layer is None else layer).get(key, ABSENT)
        return default if value is ABSENT else value

    def __setitem__(self, key: str, value: Any) -> None:
        layer = _layer(self, key)
        if layer is not None:
            layer[key] = value
        else:
            self.own[key] = value
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        layer = _layer(self, key)
        if layer is not None:
            layer[key] = ABSENT
        else:
            del self.own[key]
            super().pop(key, None)

    def _keys(self) -> list[str]:
        """Return the module's own keys, and those of layers alone: others may delete a value."""
        layers = [scope.layers.get(id(self)) for scope in _open.get()]
        keys = list(self.own)
        return [*dict.fromkeys([*keys, *(key for layer in layers for key in list(layer or ()))])]

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in self._keys() if key in self])

    def __reversed__(self) -> Iterator[str]:
        return reversed([*iter(self)])

    def __len__(self) -> int:
        return sum(1 for _ in self)  # list(self) would ask for it

    def __bool__(self) -> bool:
        return bool(len(self))

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.copy())

    # Copies, also in a pickle, are plain dicts of what can be seen.
    def copy(self) -> dict[str, Any]:
        found = [(key, self.get(key, ABSENT)) for key in self._keys()]
        return {key: value for key, value in found if value is not ABSENT}

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    fromkeys = dict.fromkeys

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**self.copy(), **other}

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**other, **self.copy()}

    def __ior__(self, other: Any) -> ScopedDict:  # type: ignore[override]
        self.update(other)
        return self

    # Of copies, which do not change while another thread reads them.
    def keys(self) -> Any:
        return self.copy().keys()

    def values(self) -> Any:
        return self.copy().values()

    def items(self) -> Any:
        return self.copy().items()

    def pop(self, key: str, *default: Any) -> Any:
        value = self.get(key, ABSENT)
        if value is not ABSENT:
            del self[key]
        elif default:
            return default[0]
        else:
            raise KeyError(key)
        return value

    def popitem(self) -> tuple[str, Any]:
        for key in reversed(self):
            return key, self.pop(key)
        raise KeyError("popitem(): dictionary is empty")

    def clear(self) -> None:
        for key in [*iter(self)]:
            del self[key]

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others: Any, **more: Any) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = value


class _ScopedAttribute:
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
            layer = _layer(owner, self.name)
            value = (owner.__dict__ if layer is None else layer).get(self.name, ABSENT)
            if value is not ABSENT:
                return value
        if self.of_class is ABSENT:
            return getattr(super(self.kind, kind if owner is None else owner), self.name)
        bind = getattr(type(self.of_class), "__get__", None)
        return self.of_class if bind is None else bind(self.of_class, owner, kind)

    def __set__(self, owner: Any, value: Any) -> None:
        layer = _layer(owner, self.name)
        (owner.__dict__ if layer is None else layer)[self.name] = value

    def __delete__(self, owner: Any) -> None:
        layer = _layer(owner, self.name)
        if layer is not None and layer[self.name] is not ABSENT:
            layer[self.name] = ABSENT
        elif layer is None and self.name in owner.__dict__:
            del owner.__dict__[self.name]
        else:
            raise AttributeError(self.name)


class ScopedCache(dict[Any, Any]):
    """The cache of ``torch.nn.utils.parametrize``, with one of its own for each scope."""

    def __init__(self, own: dict[Any, Any]) -> None:
        super().__init__()
        self.own = own

    def _seen(self) -> dict[Any, Any]:
        for scope in reversed(_open.get()):
            if id(scope) in _opened:  # or it was inherited by a thread that outlives it
                if scope.cache[0] is not self:
                    scope.cache = (self, {})
                return scope.cache[1]
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
