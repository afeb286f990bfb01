"""The cached plan of an eager call: a binding kept from call to call, and the check that it holds.

Resolving names costs microseconds a name, and the result depends only on the names and on how the
module is built. So it is kept, with weak references to the submodules, beside the *structure* of
the module: each name and the identity of each tensor and submodule in the tree. A call compares the
structure and resolves anew when it differs: a submodule replaced, a tensor added, deleted, replaced
or retied, a parametrization put on or taken off.

Identities are compared as ids, which is sound although an id can be used again. The submodules are
alive while they are compared; and of the tensors only the pattern of equal ids matters, which tells
what is tied: two tensors that live at the same time never share an id.

The check has to look at each entry of each dict, and with some hundred parameters it is most of
what a call costs. So it is made of passes in C over flat lists (``map``, ``chain``,
``itemgetter``), at 5 to 25 ns an entry, without a bytecode for a single one. What it finds is what
the call needs: the dicts to be written to, and the module's own tensors, to be put back.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, getitem, itemgetter
from typing import Any

from torch import nn

from fcall import scoped
from fcall.binding import ATTRIBUTE, Binding, bind, has_own_names, owner_at
from fcall.identity import identities
from fcall.substitution import Place, Substitution, entry_of, stores_of

__all__ = ["binding_for", "find", "plan_for"]

PLANS_PER_MODULE = 16
"""How many plans, each for one tuple of names, are kept for a module. The oldest goes first."""

_Key = tuple[tuple[str, ...], bool, bool]


Found = tuple[Substitution, Sequence[Any] | None, Sequence[Any]]
"""What a plan means for the live module; the module's own in each place, or None where more than
the entries of dicts are written; the tensors in the kept places."""


def find(module: nn.Module, names: tuple[str, ...], *, tie_weights: bool, strict: bool) -> Found:
    """Return what giving ``names`` to ``module`` writes; the errors are those of ``bind``."""
    return _current_plan(module, names, tie_weights, strict)[1]


def plan_for(
    module: nn.Module, names: tuple[str, ...], *, tie_weights: bool, strict: bool
) -> Substitution:
    """Return the substitution alone that :func:`find` returns."""
    return _current_plan(module, names, tie_weights, strict)[1][0]


def binding_for(
    module: nn.Module, names: tuple[str, ...], *, tie_weights: bool, strict: bool
) -> Binding:
    """Return ``bind(module, names, ...)``, resolved anew only when it has to be."""
    return _current_plan(module, names, tie_weights, strict)[0].binding


# Since Python 3.11 there is a function that calls, which is faster.
_referent: Callable[[weakref.ref[nn.Module]], Any] = getattr(operator, "call", weakref.ref.__call__)

STORES = ("_parameters", "_buffers", "_modules")


def _keys(stores: Sequence[Any]) -> list[str]:
    try:
        return [*chain.from_iterable(stores)]
    except TypeError:  # scripted modules' dicts are none
        return [*chain.from_iterable(store.keys() for store in stores)]


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return what takes the items at ``positions``, in C."""
    start = positions[0] if positions else 0
    in_a_row = range(start, start + len(positions))
    if [*positions] == [*in_a_row]:  # one, or none, too
        return itemgetter(slice(start, in_a_row.stop))
    return itemgetter(*positions)


class _Structure:
    """All that submodules hold: in which of their dicts, under which names, and the identities.

    Args:
        owners: The submodules.
        first: Some of the entries, each as the number of an owner, the kind of dict, and a key.
    """

    def __init__(self, owners: Sequence[nn.Module], first: Sequence[Place]) -> None:
        self.places: list[tuple[int, str]] = []
        """The owner's number, and the kind, of each dict with something in it, kind by kind."""
        self.full, self.empty = [], []
        for kind in STORES:
            get = attrgetter(kind)
            is_full = [bool(store) for store in map(get, owners)]
            full = [i for i, holds in enumerate(is_full) if holds]
            empty = [i for i, holds in enumerate(is_full) if not holds]
            self.places += [(i, kind) for i in full]
            self.full += [(get, _picker(full))] if full else []
            self.empty += [(get, _picker(empty))] if empty else []
        self.positions = {place: i for i, place in enumerate(self.places)}
        stores = self.stores(owners)
        self.keys = _keys(stores)
        homes = chain.from_iterable([place] * len(d) for place, d in zip(self.places, stores))
        every = [(*home, key) for home, key in zip(homes, self.keys)]
        entries = [*dict.fromkeys((*first, *every))]
        self.stores_of_each = _picker([self.positions[i, kind] for i, kind, _ in entries])
        self.key_of_each = [key for _, _, key in entries]
        self.identities = identities(self.entries(stores)[1])

    def stores(self, owners: Sequence[Any]) -> list[Any]:
        """Return the dicts that have something in them, as whoever asks sees them.

        Raises:
            KeyError: one has that was empty.
        """
        stores: list[Any] = []
        for get, owners_of in self.full:
            stores += map(get, owners_of(owners))
        for get, owners_of in self.empty:
            if any(map(get, owners_of(owners))):
                raise KeyError
        return [*map(scoped.own_dict, stores)] if scoped.count() else stores

    def entries(self, stores: Sequence[Any]) -> tuple[Sequence[Any], tuple[Any, ...]]:
        """Return for each entry, ``first`` ones first, its store and what stands there.

        Raises:
            KeyError: one is gone.
        """
        stores_of_each = self.stores_of_each(stores)
        return stores_of_each, tuple(map(getitem, stores_of_each, self.key_of_each))

    def is_that_of(self, stores: Sequence[Any], entries: tuple[Any, ...]) -> bool:
        """Whether ``stores``, with these ``entries``, hold the same as ever."""
        # The keys need no mark where those of one store end and those of the next begin: a store
        # has at least the keys of its entries, so that one with more leaves too few for the others.
        return identities(entries) == self.identities and _keys(stores) == self.keys


def _order(dicts: Sequence[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Return the keys of all, one dict after the other, and how many are of each."""
    return [*chain.from_iterable(dicts)], [*map(len, dicts)]


class _Plan:
    """A binding, and the submodules and the structure that it was made from."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], ties: bool, strict: bool) -> None:
        self.binding = binding = bind(module, names, tie_weights=ties, strict=strict)
        owners = list(module.modules())
        number = {id(owner): i for i, owner in enumerate(owners)}
        paths = {path: number[id(owner)] for path, owner in module.named_modules()}
        # Where a plain attribute is found depends on more than the structure tells; so does what
        # a module calls its tensors itself.
        attributes = any(slot.store == ATTRIBUTE for slot in binding.slots)
        self.cacheable = not attributes and not has_own_names(module)
        for slot in binding.slots:
            if slot.path not in paths:  # a module in a plain attribute
                self.cacheable = False
                paths[slot.path] = len(owners)
                owners.append(owner_at(module, slot.path))
        self.owners = [weakref.ref(owner) for owner in owners]
        self.rnns = [paths[path] for path in binding.rnns]
        self.places = [(paths[slot.path], slot.store, slot.key) for slot in binding.slots]
        self.keys = [slot.key for slot in binding.slots]
        self.kept = [(slot.name, (paths[slot.path], slot.store, slot.key)) for slot in binding.kept]
        in_order = range(len(names))
        sources = in_order if binding.sources == [*in_order] else binding.sources
        self.fixed = self.places, self.keys, sources, binding.homes, binding.same, self.kept

        written = [place for place in self.places if place[1] in STORES]
        kept = [place for _, place in self.kept]
        self.structure = _Structure(owners, [*written, *kept])
        stores = self.structure.stores(owners)
        position = [self.structure.positions[i, kind] for i, kind, _ in written]
        dicts = sorted({i for i in position if isinstance(stores[i], dict)})
        self.is_plain = len(written) == len(self.places) and {*position} == {*dicts}
        """Whether values go to entries of dicts, and nowhere else."""
        self.written = len(written)
        self.dicts_of, self.order = _picker(dicts), _order([stores[i] for i in dicts])
        self.groups, self.group_of_each = [self.structure.places[i] for i in dicts], []
        if self.is_plain and all(kind in vars(owners[i]) for i, kind in self.groups):
            number_of = {i: number for number, i in enumerate(dicts)}
            self.group_of_each = [number_of[i] for i in position]

    def find(self, *, is_new: bool = False) -> Found | None:
        """Return what the plan means for the module, or None if that is built in another way."""
        owners = [*map(_referent, self.owners)]
        try:
            stores = self.structure.stores(owners)
            written, held = self.structure.entries(stores)
        except (AttributeError, KeyError):  # a submodule is gone, or a tensor
            if is_new:
                raise
            return None
        if not is_new and not self.structure.is_that_of(stores, held):
            return None
        count = self.written
        kept = held[count : count + len(self.kept)]
        originals: Sequence[Any] | None = None
        if self.is_plain:
            originals, written, dicts = held[:count], written[:count], self.dicts_of(stores)
            order, counts, groups = *self.order, self.groups
        else:
            written = [entry_of(owners[i], store, key)[0] for i, store, key in self.places]
            dicts = list({id(d): d for d in stores_of(zip(written, self.keys))}.values())
            order, counts, groups = *_order(dicts), []
        rnns = [owners[i] for i in self.rnns] if self.rnns else []
        of_dicts = dicts, order, counts, groups, self.group_of_each
        parts = owners, written, *self.fixed, rnns, *of_dicts
        return Substitution._make(parts), originals, kept


def _current_plan(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[_Plan, Found]:
    plans = _plans_of(module)
    key = (names, tie_weights, strict)
    plan = plans.get(key)
    if plan is not None:
        found = plan.find()
        if found is not None:
            return plan, found
    plan = _Plan(module, names, tie_weights, strict)
    if plan.cacheable:
        plans.pop(key, None)  # so that the newest is last
        for oldest in list(plans)[: 1 - PLANS_PER_MODULE]:  # other threads may do the same
            plans.pop(oldest, None)
        plans[key] = plan
    return plan, plan.find(is_new=True)  # type: ignore[return-value]


_plans: dict[int, tuple[weakref.ref[nn.Module], dict[_Key, _Plan]]] = {}


def _plans_of(module: nn.Module) -> dict[_Key, _Plan]:
    """Return the plans kept for ``module``; they go when it does."""
    # By id and not in a WeakKeyDictionary, since a module may define what it equals.
    number = id(module)
    known = _plans.get(number)
    if known is None or known[0]() is not module:
        known = (weakref.ref(module, lambda _: _plans.pop(number, None)), {})
        _plans[number] = known
    return known[1]
