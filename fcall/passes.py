"""What a call does to each of many parameters: one step for all of them, instead of one for each.

A step for one parameter, in Python's bytecode, takes as long as all that has to be done to it. So
these functions go over whole lists, with nothing in between. They are written twice: here, of
passes in C that Python brings along (``map``, ``chain``), at 5 to 30 ns an item; and in
``_passes.c``, which is a part of fcall where it was installed with a C compiler at hand, and takes
a third of that. What the C does not take on, as subclasses of ``dict``, it leaves to Python. What
is done to :class:`fcall.scoped.ScopedDict` is there, and in ``_scoped.c``, in the same way.

No signal is handled in the middle of the C, nor of a pass.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, cycle, repeat
from operator import attrgetter, contains, getitem, is_, setitem
from typing import Any
from weakref import ref

from fcall.identity import identities

__all__ = [
    "ABSENT",
    "IN_C",
    "STORES",
    "Looked",
    "are_in",
    "are_in_in_python",
    "are_plain",
    "are_plain_in_python",
    "are_same",
    "exchange",
    "have_keys",
    "having",
    "having_in_python",
    "look",
    "look_in_python",
    "pick",
    "put_back",
    "put_back_in_python",
    "put_in",
    "put_in_in_python",
    "read",
    "scoped_base",
]

REVISION = 2
"""That of ``_passes.c`` and ``_scoped.c``: libraries built from older ones are left alone."""

IN_C = False
"""Whether the C is used. Not where Python has no GIL, on which it counts."""

with contextlib.suppress(ImportError):
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        from fcall import _passes, _scoped

        IN_C = _passes.REVISION == _scoped.REVISION == REVISION and not os.environ.get(
            "FCALL_PURE_PYTHON"
        )

ABSENT: Any = object()
"""In place of the value of an entry that is not there."""

STORES = ("_parameters", "_buffers", "_modules")
"""The dicts in which a module keeps its tensors and submodules."""

Looked = tuple[list[Any], list[Any], list[Any], list[Any], list[Any]]
"""Modules; the dict of each place; these dicts, each once; what stands in the places; and what
else was asked for."""


def look_in_python(
    references: Sequence[ref[Any]],
    lengths: tuple[int, ...],
    keys: tuple[str, ...],
    ids: bytes,
    of_each: Sequence[int],
    written: Sequence[int],
    of_places: Sequence[int],
    others: Sequence[int],
    own_dict: Callable[[Any], Any] | None = None,
) -> Looked | None:
    """Return what is asked of modules, or None if one is gone, or holds other than was expected.

    Args:
        references: Weak references to the modules.
        lengths: How many entries the dicts in :data:`STORES` have, those of one module after those
            of the other.
        keys: All of their keys, in the same order.
        ids: The identities of all of their values, in the same order.
        of_each: The number, among all of these dicts, of the dict of each place.
        written: The numbers of these, each once.
        of_places: The number, among all of the values, of what stands in each place.
        others: The numbers of what else is asked for.
        own_dict: If any, what replaces each dict by the one that is to be looked at.
    """
    owners = [reference() for reference in references]
    try:
        dicts = [*map(getattr, chain.from_iterable(zip(owners, owners, owners)), cycle(STORES))]
    except AttributeError:  # one is gone, and None has none
        return None
    if own_dict is not None:
        dicts = [*map(own_dict, dicts)]
    if tuple(map(len, dicts)) != lengths or tuple(chain.from_iterable(map(_keys, dicts))) != keys:
        return None
    held = tuple(chain.from_iterable(map(_values, dicts)))
    if identities(held) != ids:
        return None
    return pick(owners, dicts, held, of_each, written, of_places, others)


def pick(
    owners: list[Any],
    dicts: Sequence[Any],
    held: Sequence[Any],
    of_each: Sequence[int],
    written: Sequence[int],
    of_places: Sequence[int],
    others: Sequence[int],
) -> Looked:
    """Return what :func:`look` returns of modules with these dicts, which hold these values."""
    dict_at, value_at = dicts.__getitem__, held.__getitem__
    of_dicts = [*map(dict_at, of_each)], [*map(dict_at, written)]
    return owners, *of_dicts, [*map(value_at, of_places)], [*map(value_at, others)]


def _keys(entries: Any) -> Iterable[str]:
    return entries if isinstance(entries, dict) else entries.keys()  # scripted modules' are none


def _values(entries: Any) -> Iterable[Any]:
    return entries.values()  # type: ignore[no-any-return]


def read(stores: Sequence[Any], keys: Sequence[str]) -> list[Any]:
    """Return what stands in each store under its key, :data:`ABSENT` for nothing."""
    try:
        return [*map(getitem, stores, keys)]
    except KeyError:
        return [store.get(key, ABSENT) for store, key in zip(stores, keys)]


def put_in_in_python(stores: Sequence[Any], keys: Sequence[str], values: Sequence[Any]) -> None:
    """Write each value to its store."""
    deque(map(setitem, stores, keys, values), maxlen=0)


def put_back_in_python(
    stores: Sequence[Any],
    keys: Sequence[str],
    originals: Sequence[Any],
    given: Sequence[Any],
    taken: list[Any],
    dicts: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    order: Sequence[str],
    places: Sequence[int],
) -> bool:
    """Undo :func:`put_in`, if nothing has happened since; else do nothing, and return False.

    Args:
        stores: The dict of each place.
        keys: The key in each.
        originals: What is to be written.
        given: What has to stand there.
        taken: Set to that, before anything is written.
        dicts: The dicts, each once.
        lengths: How many keys each has to have.
        order: These keys, one dict after the other.
        places: For each of these the number of the place that it is, or -1.
    """
    if not have_keys(dicts, lengths, order) or not are_same(read(stores, keys), given):
        return False
    taken[:] = given
    put_in(stores, keys, originals)
    return True


def exchange(
    stores: Sequence[Any], keys: Sequence[str], values: Sequence[Any], before: list[Any]
) -> None:
    """Write each value to its store, whatever stands there.

    Args:
        stores: What is written to.
        keys: The key in each.
        values: The value for each.
        before: Set to what stood there, :data:`ABSENT` for nothing, before anything is written.
            If it has items it is left alone: then this was called before, and interrupted.
    """
    if not before:
        before[:] = read(stores, keys)
    put_in(stores, keys, values)


def have_keys(dicts: Sequence[dict[str, Any]], lengths: Sequence[int], keys: Sequence[str]) -> bool:
    """Whether dicts have so many keys each, and, one dict after the other, these in this order."""
    return [*map(len, dicts)] == [*lengths] and [*chain.from_iterable(dicts)] == [*keys]


def are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


def are_in_in_python(stores: Sequence[Any], keys: Sequence[str], values: Sequence[Any]) -> bool:
    """Whether the values stand in the stores. Of what is no plain dict, C does not say so."""
    return are_same(read(stores, keys), values)


def are_plain_in_python(things: Sequence[Any], kinds: tuple[type, ...], flag: Any) -> bool:
    """Whether all things are of some classes, not of subclasses, and a flag is set for none.

    Args:
        things: What is asked about.
        kinds: The classes.
        flag: The attribute as a class has it: ``torch.Tensor.is_meta``, say.
    """
    return {*kinds}.issuperset(map(type, things)) and not any(
        map(attrgetter(flag.__name__), things)
    )


def having_in_python(owners: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return those of ``owners`` that have an attribute of their own with one of ``names``."""
    attributes = [*map(vars, owners)]
    have = zip(*[map(contains, attributes, repeat(name)) for name in names])
    return [*compress(owners, map(any, have))]


scoped_base: Callable[..., type[Any]] | None = _scoped.scoped_base if IN_C else None
"""Makes the base class of :class:`fcall.scoped.ScopedDict`, or it is written in Python."""

if IN_C:
    look, put_in, put_back = _passes.look, _passes.put_in, _passes.put_back
    are_in, are_plain, having = _passes.are_in, _passes.are_plain, _passes.having
else:
    look, put_in, put_back = look_in_python, put_in_in_python, put_back_in_python
    are_in, are_plain, having = are_in_in_python, are_plain_in_python, having_in_python
