"""The dicts that stand in for those of a module, and show each thread or task what it is to see."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fcall.passes import ABSENT, are_in, put_in, read, scoped_base
from fcall.scoped.context import layer_over, open_scopes

__all__ = ["Installed", "ScopedDict", "own_dict", "shows_own"]

Installed = tuple[dict[str, Any], str, "ScopedDict"]
"""The ``__dict__`` of a module, a key in it, and what stands there in place of a module's dict."""

_own_of, _scopes_of = attrgetter("own"), attrgetter("scopes")


def own_dict(entries: Any) -> Any:
    """Return the dict that ``entries`` is for whoever asks, as plain as possible."""
    return entries.own if type(entries) is ScopedDict and shows_own(entries) else entries


def shows_own(entries: Any) -> bool:
    """Whether no scope of whoever asks has other values in ``entries``, a dict of a module."""
    return not any(id(entries) in scope for scope in open_scopes.get())


class _BaseInPython(dict[str, Any]):
    """What is done in every call: dicts are put over those of modules, read, and taken away again.

    ``_scoped.c`` has the same in C.
    """

    __slots__ = ("own", "scopes")
    own: dict[str, Any]
    """The module's own dict."""
    scopes: tuple[int, ...]
    """The ids of the open scopes that have a layer."""

    @classmethod
    def install(
        cls,
        owners: Sequence[Any],
        groups: Sequence[tuple[int, str]],
        group_of_each: Sequence[int],
        scopes: tuple[int, ...],
        scope: dict[int, dict[str, Any]],
        installed: list[Installed],
    ) -> list[dict[str, Any]] | None:
        """Put a dict over each of several, if these are plain; else do nothing, and return None.

        Args:
            owners: The modules.
            groups: For each dict the number of its module, and its name there.
            group_of_each: The numbers of the dicts whose layers are returned.
            scopes: The scopes in which they have layers.
            scope: Gets a layer for each of them, by its id.
            installed: Gets a place for each of them, before anything is put there.
        """
        homes, names = [vars(owners[number]) for number, _ in groups], [name for _, name in groups]
        standing = read(homes, names)
        if not {dict}.issuperset(map(type, standing)):
            return None
        made = [*map(cls, standing)]  # no bytecode for a single one: there may be hundreds
        deque(map(cls.own.__set__, made, standing), maxlen=0)  # type: ignore[attr-defined]
        deque(map(cls.scopes.__set__, made, repeat(scopes)), maxlen=0)  # type: ignore[attr-defined]
        layers: list[dict[str, Any]] = [{} for _ in made]
        of_each = [*map(layers.__getitem__, group_of_each)]
        installed += zip(homes, names, made)  # type: ignore[arg-type]
        scope.update(zip(map(id, made), layers))
        put_in(homes, names, made)
        return of_each

    @classmethod
    def uninstall(cls, installed: list[Installed], scopes: tuple[int, ...]) -> bool:
        """Undo :meth:`install`, unless something came in between; then return False."""
        homes, names, dicts = zip(*installed)
        if [*map(_scopes_of, dicts)] != [scopes] * len(dicts) or not are_in(homes, names, dicts):
            return False
        put_in(homes, names, [*map(_own_of, dicts)])
        return True

    def _read(self, key: str) -> Any:
        """Return what whoever asks sees under ``key``, ``ABSENT`` for nothing."""
        layer = layer_over(self, key)
        return (self.own if layer is None else layer).get(key, ABSENT)

    def __getitem__(self, key: str) -> Any:
        try:
            value = open_scopes.get()[-1][id(self)][key]  # as a rule
        except (IndexError, KeyError):
            value = self._read(key)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        try:
            return open_scopes.get()[-1][id(self)][key] is not ABSENT
        except (IndexError, KeyError):
            return self._read(key) is not ABSENT  # type: ignore[arg-type]


_Base = _BaseInPython
if not TYPE_CHECKING and scoped_base is not None:
    _Base = scoped_base(open_scopes, ABSENT)


class ScopedDict(_Base):
    """A dict of a module, with other values for those in a scope.

    Its storage as a plain dict, which C code may look at, has the module's own entries, too.
    """

    __slots__ = ()

    @classmethod
    def over(cls, own: dict[str, Any]) -> ScopedDict:
        """Return one that stands for ``own``, in no scope yet."""
        made = cls(own)
        made.own, made.scopes = own, ()
        return made

    def get(self, key: str, default: Any = None) -> Any:
        value = self._read(key)
        return default if value is ABSENT else value

    def __setitem__(self, key: str, value: Any) -> None:
        layer = layer_over(self, key)
        if layer is not None:
            layer[key] = value
        else:
            self.own[key] = value
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        layer = layer_over(self, key)
        if layer is not None:
            layer[key] = ABSENT
        else:
            del self.own[key]
            super().pop(key, None)

    def _keys(self) -> list[str]:
        """Return the module's own keys, and those of layers alone: others may delete a value."""
        layers = [scope.get(id(self)) for scope in open_scopes.get()]
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

    __hash__ = None  # type: ignore[assignment]

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
