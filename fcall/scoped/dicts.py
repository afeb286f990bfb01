"""The dicts that stand in for those of a module, and show each thread or task what it is to see."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from fcall.passes import ABSENT, scoped_reads
from fcall.scoped.context import layer_over, open_layers, open_scopes

__all__ = ["ScopedDict", "own_dict", "shows_own"]


def own_dict(entries: Any) -> Any:
    """Return the dict that ``entries`` is for whoever asks, as plain as possible."""
    return entries.own if type(entries) is ScopedDict and shows_own(entries) else entries


def shows_own(entries: Any) -> bool:
    """Whether no scope of whoever asks has other values in ``entries``, a dict of a module."""
    return not any(id(entries) in scope.layers for scope in open_scopes.get())


class _ReadsInPython(dict[str, Any]):
    """What reads a parameter: two methods, which look at the innermost scope at once."""

    __slots__ = ()

    def _read(self, key: str) -> Any:
        """Return what whoever asks sees under ``key``, ``ABSENT`` for nothing."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        try:
            value = open_layers.get()[id(self)][key]
        except KeyError:
            value = self._read(key)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        try:
            return open_layers.get()[id(self)][key] is not ABSENT  # type: ignore[index]
        except KeyError:
            return self._read(key) is not ABSENT  # type: ignore[arg-type]


if TYPE_CHECKING or scoped_reads is None:
    _Reads = _ReadsInPython
else:
    _Reads = scoped_reads(open_layers, ABSENT)


class ScopedDict(_Reads):
    """A dict of a module, with other values for those in a scope.

    Its storage as a plain dict, which C code may look at, has the module's own entries, too.
    """

    __slots__ = ("own", "scopes")
    own: dict[str, Any]
    """The module's own dict."""
    scopes: tuple[int, ...]
    """The ids of the open scopes that have a layer."""

    @classmethod
    def over(cls, owns: Sequence[dict[str, Any]], scopes: tuple[int, ...]) -> list[ScopedDict]:
        """Return one for each of ``owns``. There may be hundreds: no bytecode for a single one."""
        made = [*map(cls, owns)]
        deque(map(cls.own.__set__, made, owns), maxlen=0)  # type: ignore[attr-defined]
        deque(map(cls.scopes.__set__, made, repeat(scopes)), maxlen=0)  # type: ignore[attr-defined]
        return made

    def _read(self, key: str) -> Any:
        layer = layer_over(self, key)
        return (self.own if layer is None else layer).get(key, ABSENT)

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
        layers = [scope.layers.get(id(self)) for scope in open_scopes.get()]
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
