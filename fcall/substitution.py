"""Writing values into the dicts of a live module, and taking them out again.

Both routes do it: the eager one around a real call, the operator's in the body that is traced. So
it is plain code that Dynamo can trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.nn.utils import parametrize

from fcall.binding import ATTRIBUTE, BYPASS, Binding, owner_at
from fcall.passes import ABSENT

__all__ = [
    "Bypasses",
    "Entry",
    "Layout",
    "Place",
    "Store",
    "Substituted",
    "Substitution",
    "delete_absent",
    "dicts_of",
    "entry_of",
    "put_back_rnn_lists",
    "reassigned",
    "rnn_lists",
    "stores_of",
    "substitution_of",
    "swap_in",
    "swap_out",
]


class Store(Protocol):
    """What is written to: a dict, or what looks like one."""

    def get(self, key: str, default: Any, /) -> Any: ...
    def __getitem__(self, key: str, /) -> Any: ...
    def __setitem__(self, key: str, value: Any, /) -> None: ...
    def __delitem__(self, key: str, /) -> None: ...


Entry = tuple[Store, str]
"""A store and the key in it that is written."""

Place = tuple[int, str, str]
"""The number of an owner, the kind of store that it has, and the key in that."""


class Layout(NamedTuple):
    """What one call writes where: a binding in terms of numbered submodules."""

    places: Sequence[Place]
    """Where values go, each once."""
    keys: Sequence[str]
    """The keys of the places."""
    sources: Sequence[int]
    """For each place the number of the given value that goes there; a ``range`` if each value goes
    to one place, in the order of the places."""
    homes: Sequence[int]
    """For each given value the position of the place that holds its successor after the call."""
    same: Sequence[Sequence[str]]
    """Groups of names that need one and the same value."""
    kept: Sequence[tuple[str, Place]]
    """The registered tensors that stay the module's own, by name."""
    groups: Sequence[tuple[int, str]] = ()
    """For each dict that is written to the number of its owner, and its kind."""
    group_of_each: Sequence[int] = ()
    """For each place the position of its dict in ``groups``; nothing if a store is no dict that its
    owner keeps."""
    place_of_each: Sequence[int] = ()
    """For each key in the dicts the number of its place, or -1; nothing in the same case."""


class Substitution(NamedTuple):
    """What one call writes into the live module: a layout, made concrete."""

    layout: Layout
    owners: Sequence[nn.Module]
    """The submodules, by their numbers."""
    stores: Sequence[Store]
    """The stores of the places."""
    rnns: Sequence[nn.RNNBase]
    """Submodules that keep a second list of their weights."""
    dicts: Sequence[dict[str, Any]] = ()
    """The dicts among the stores, or in them, each once."""
    lengths: Sequence[int] = ()
    """How many keys each of these has."""
    order: Sequence[str] = ()
    """The keys of all of these, one dict after the other."""

    def spread(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return for each place the one of the given ``values`` that goes there."""
        sources = self.layout.sources
        if type(sources) is range:
            return values
        return tuple(map(values.__getitem__, sources))

    @property
    def entries(self) -> list[Entry]:
        """The entries to be written."""
        return list(zip(self.stores, self.layout.keys))

    @property
    def kept(self) -> list[tuple[str, Entry]]:
        """The entries of the registered tensors that stay the module's own, by name."""
        return [
            (name, entry_of(self.owners[number], store, key))
            for name, (number, store, key) in self.layout.kept
        ]


def substitution_of(module: nn.Module, binding: Binding) -> Substitution:
    """Return what ``binding`` means for the live ``module``."""
    numbers: dict[str, int] = {}
    owners: list[nn.Module] = []
    for path, _, _ in (*binding.slots, *binding.kept):
        if path not in numbers:
            numbers[path] = len(owners)
            owners.append(owner_at(module, path))
    places = [(numbers[slot.path], slot.store, slot.key) for slot in binding.slots]
    kept = [(slot.name, (numbers[slot.path], slot.store, slot.key)) for slot in binding.kept]
    keys = [slot.key for slot in binding.slots]
    return Substitution(
        Layout(places, keys, binding.sources, binding.homes, binding.same, kept),
        owners,
        stores=[entry_of(owners[number], store, key)[0] for number, store, key in places],
        rnns=[owner_at(module, path) for path in binding.rnns],  # type: ignore[misc]
    )


def entry_of(owner: nn.Module, store: str, key: str) -> Entry:
    """Return the entry that a slot stands for."""
    if store == BYPASS:
        return Bypasses(owner.parametrizations._modules), key  # type: ignore[union-attr]
    if store == ATTRIBUTE:
        return _Attributes(owner), key
    entries = getattr(owner, store)
    return entries if isinstance(entries, dict) else _ScriptedDict(entries), key


def stores_of(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return the dicts that are written to for ``entries``, some of them more than once."""
    stores = []
    for store, _ in entries:
        if isinstance(store, Bypasses):
            stores.append(store.parametrizations)
        elif isinstance(store, dict):
            stores.append(store)
    return stores


def dicts_of(substitution: Substitution) -> list[dict[str, Any]]:
    """Return the dicts that are written to, each once. Dynamo has no ``id`` to tell them apart."""
    places = zip(substitution.layout.places, substitution.entries)
    first_entries = {(number, store): entry for (number, store, _), entry in places}
    return stores_of(first_entries.values())


def put_in_order(store: dict[str, Any], keys: Sequence[str]) -> None:
    """Undo what deleting and registering again does: an optimizer counts by order."""
    if list(store) != keys:
        entries = {key: store[key] for key in (*keys, *store) if key in store}
        store.clear()
        store.update(entries)


def swap_in(entries: Iterable[Entry], values: Iterable[Any], originals: list[Any]) -> None:
    """Write ``values`` to ``entries``, adding to ``originals`` what was there before.

    When it is interrupted, ``originals`` is as long as there are entries to be put back.
    """
    for (store, key), value in zip(entries, values):
        originals.append(store.get(key, ABSENT))
        store[key] = value


def swap_out(entries: Sequence[Entry], originals: Sequence[Any]) -> list[Any]:
    """Put ``originals`` back and return what stood in their place, ``ABSENT`` for nothing."""
    values: list[Any] = [ABSENT] * len(originals)
    for i in reversed(range(len(originals))):  # two entries may be one: the first has its original
        store, key = entries[i]
        values[i] = store.get(key, ABSENT)
        if originals[i] is not ABSENT:
            store[key] = originals[i]
        elif values[i] is not ABSENT:
            del store[key]
    return values


def delete_absent(stores: Sequence[Store], keys: Sequence[str], values: Sequence[Any]) -> None:
    """Delete what was written for ``ABSENT`` among ``values``."""
    if any(map(is_, values, repeat(ABSENT))):
        for store, key, value in zip(stores, keys, values):
            if value is ABSENT and store.get(key, None) is ABSENT:
                del store[key]


def rnn_lists(rnns: Iterable[nn.RNNBase]) -> list[tuple[nn.RNNBase, Any, Any]]:
    """Return the lists in which RNNs keep their weights a second time, to be put back later.

    An RNN makes them anew in a call that finds other weights, and would keep them from then on.
    """
    return [(rnn, rnn._flat_weights, rnn._flat_weight_refs) for rnn in rnns]


def put_back_rnn_lists(lists: Iterable[tuple[nn.RNNBase, Any, Any]]) -> None:
    """Undo what calls did to the lists that :func:`rnn_lists` returned."""
    for rnn, weights, references in lists:
        rnn._flat_weights = weights
        rnn._flat_weight_refs = references


def reassigned(
    substitution: Substitution, before: Sequence[Any], after: Sequence[Any]
) -> dict[int, Any]:
    """Return what the module put in place of the given values, by their numbers.

    Args:
        substitution: What was written.
        before: The given values.
        after: What :func:`swap_out` returned; shorter than the entries if swapping in was
            interrupted. A tensor that the module deleted has no successor.
    """
    changed = {}
    for number, home in enumerate(substitution.layout.homes):
        if home < len(after) and after[home] is not before[number] and after[home] is not ABSENT:
            changed[number] = after[home]
    return changed


class Substituted:
    """A context in which the given values stand in the module, for Dynamo to trace."""

    def __init__(self, substitution: Substitution, values: Sequence[Any]) -> None:
        self.substitution = substitution
        self.values = values
        self.entries = substitution.entries
        self.orders: list[tuple[dict[str, Any], list[str]]] = []
        self.originals: list[Any] = []
        self.lists: list[tuple[nn.RNNBase, Any, Any]] = []
        self.changed: dict[int, Any] = {}
        """What the module reassigned, by the numbers of the values; known when the context ends."""

    def __enter__(self) -> Substituted:
        to = self.substitution
        self.orders = [(store, list(store)) for store in dicts_of(to)]
        self.lists = rnn_lists(to.rnns)
        try:
            swap_in(self.entries, [self.values[i] for i in to.layout.sources], self.originals)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the context, if it has not ended."""
        after = swap_out(self.entries, self.originals)
        for store, keys in self.orders:
            put_in_order(store, keys)
        put_back_rnn_lists(self.lists)
        if after:
            self.changed = reassigned(self.substitution, self.values, after)
        self.orders, self.originals, self.lists = [], [], []


class _ScriptedDict:
    """The parameters or buffers of a scripted submodule, which torch wraps in what is no dict."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries

    def get(self, key: str, default: Any) -> Any:
        return self.entries[key] if key in self.entries else default  # noqa: SIM401, it has no get

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]


def _keeps_values(of_class: Any) -> bool:
    """Whether an attribute of a class keeps the instance's values: a property, one of __slots__."""
    return hasattr(type(of_class), "__set__")


class _Attributes:
    """The plain attributes of a module, as a dict would hold them."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def get(self, key: str, default: Any) -> Any:
        if _keeps_values(getattr(type(self.owner), key, None)):
            return getattr(self.owner, key, default)
        for entries in (self.owner.__dict__, *self._registered()):
            if key in entries:
                return entries[key]
        return default  # an attribute of the class is not the module's own

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, ABSENT)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        for entries in self._registered():
            if key in entries:  # the module assigned a Parameter to it
                del entries[key]
        # Not the module's own __setattr__, which would register a Parameter.
        object.__setattr__(self.owner, key, value)

    def __delitem__(self, key: str) -> None:
        delattr(self.owner, key)

    def _registered(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.owner._parameters, self.owner._buffers


class Bypasses:
    """The parametrized tensors of a module by their plain names.

    A substituted one takes the place of its parametrization as a whole, as ``torch.func`` documents
    (it runs ``right_inverse`` instead).
    """

    def __init__(self, parametrizations: dict[str, Any]) -> None:
        self.parametrizations = parametrizations

    def __getitem__(self, key: str) -> Any:
        entry = self.parametrizations[key]
        return entry.value if isinstance(entry, _Bypass) else entry

    def get(self, key: str, default: Any) -> Any:
        entry = self.parametrizations.get(key, default)
        return entry.value if isinstance(entry, _Bypass) else entry

    def __setitem__(self, key: str, value: Any) -> None:
        is_itself = value is ABSENT or isinstance(value, parametrize.ParametrizationList)
        self.parametrizations[key] = value if is_itself else _Bypass(value)

    def __delitem__(self, key: str) -> None:
        del self.parametrizations[key]


class _Bypass(nn.Module):
    """Stands for the ParametrizationList of a tensor, and is the tensor."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.right_inverse(value)

    def forward(self) -> Any:
        return self.value

    def right_inverse(self, value: Any) -> None:
        """Take an assignment to the tensor."""
        object.__setattr__(self, "value", value)  # nothing to be registered
