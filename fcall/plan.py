"""The cached plan of an eager call: a binding kept from call to call, and the check that it holds.

Resolving names costs microseconds a name, and the result depends only on the names and on how the
module is built. So it is kept, with weak references to the submodules, beside the *structure* of
the module: each name and the identity of each tensor and submodule in the tree. A call compares the
structure and resolves anew when it differs: a submodule replaced, a tensor added, deleted, replaced
or retied, a parametrization put on or taken off.

Identities are compared as ids, which is sound although an id can be used again. The submodules are
alive while they are compared; and of the tensors only the pattern of equal ids matters, which tells
what is tied: two tensors that live at the same time never share an id.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import nn

from fcall import scoped
from fcall.binding import ATTRIBUTE, Binding, bind, has_own_names, owner_at
from fcall.substitution import Store, Substitution, entry_of, stores_of

__all__ = ["binding_for", "plan_for"]

PLANS_PER_MODULE = 16
"""How many plans, each for one tuple of names, are kept for a module. The oldest goes first."""

_Key = tuple[tuple[str, ...], bool, bool]


def plan_for(
    module: nn.Module, names: Sequence[str], *, tie_weights: bool, strict: bool
) -> Substitution:
    """Return what giving ``names`` to ``module`` writes; the errors are those of ``bind``."""
    plan, owners, stores = _current_plan(module, tuple(names), tie_weights, strict)
    return plan.substitution(owners, stores)


def binding_for(
    module: nn.Module, names: tuple[str, ...], *, tie_weights: bool, strict: bool
) -> Binding:
    """Return ``bind(module, names, ...)``, resolved anew only when it has to be."""
    return _current_plan(module, names, tie_weights, strict)[0].binding


class _Plan:
    """A binding, and the submodules and the structure that it was made from."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], ties: bool, strict: bool) -> None:
        self.binding = bind(module, names, tie_weights=ties, strict=strict)
        owners = list(module.modules())
        self.structure = _structure(_stores(owners))
        number = {id(owner): i for i, owner in enumerate(owners)}
        paths = {path: number[id(owner)] for path, owner in module.named_modules()}
        # Where a plain attribute is found depends on more than the structure tells; so does what
        # a module calls its tensors itself.
        attributes = any(slot.store == ATTRIBUTE for slot in self.binding.slots)
        self.cacheable = not attributes and not has_own_names(module)
        for slot in self.binding.slots:
            if slot.path not in paths:  # a module in a plain attribute
                self.cacheable = False
                paths[slot.path] = len(owners)
                owners.append(owner_at(module, slot.path))
        self.owners = [weakref.ref(owner) for owner in owners]
        slots, kept = self.binding.slots, self.binding.kept
        self.places = [(paths[slot.path], slot.store, slot.key) for slot in slots]
        self.keys = [slot.key for slot in slots]
        self.kept = [(slot.name, (paths[slot.path], slot.store, slot.key)) for slot in kept]
        self.rnns = [paths[path] for path in self.binding.rnns]
        stores = _stores(owners)
        self.positions = [
            3 * number + STORES.index(store) if store in STORES else -1
            for number, store, _ in self.places
        ]
        dicts = {i for i in self.positions if i >= 0 and isinstance(stores[i], dict)}
        self.is_plain = dicts == set(self.positions)
        self.dicts = sorted(dicts)
        self.order = [key for i in self.dicts for key in stores[i]]
        self.counts = [len(stores[i]) for i in self.dicts]

    def live_owners(self) -> list[nn.Module]:
        """Return the submodules that are still there."""
        return [owner for reference in self.owners if (owner := reference()) is not None]

    def substitution(self, owners: list[nn.Module], stores: list[Any]) -> Substitution:
        """Return what the binding means for the live ``owners``, which have these ``stores``."""
        written: list[Store]
        if self.is_plain:
            written = [*map(stores.__getitem__, self.positions)]
            dicts, order, counts = [*map(stores.__getitem__, self.dicts)], self.order, self.counts
        else:
            written = [
                entry_of(owners[number], store, key)[0] for number, store, key in self.places
            ]
            dicts = list({id(d): d for d in stores_of(zip(written, self.keys))}.values())
            order, counts = [*chain.from_iterable(dicts)], [*map(len, dicts)]
        return Substitution(
            owners=owners,
            places=self.places,
            stores=written,
            keys=self.keys,
            sources=self.binding.sources,
            homes=self.binding.homes,
            same=self.binding.same,
            kept_places=self.kept,
            rnns=[owners[number] for number in self.rnns],  # type: ignore[misc]
            dicts=dicts,
            order=order,
            counts=counts,
        )


def _current_plan(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[_Plan, list[nn.Module], list[Any]]:
    plans = _plans_of(module)
    key = (names, tie_weights, strict)
    plan = plans.get(key)
    if plan is not None:
        owners = plan.live_owners()
        stores = _stores(owners)
        if _structure(stores) == plan.structure:
            return plan, owners, stores
    plan = _Plan(module, names, tie_weights, strict)
    if plan.cacheable:
        plans.pop(key, None)  # so that the newest is last
        for oldest in list(plans)[: 1 - PLANS_PER_MODULE]:  # other threads may do the same
            plans.pop(oldest, None)
        plans[key] = plan
    owners = plan.live_owners()
    return plan, owners, _stores(owners)


STORES = ("_parameters", "_buffers", "_modules")
_stores_of_one = attrgetter(*STORES)


def _stores(owners: list[nn.Module]) -> list[Any]:
    """Return the three dicts of each of ``owners``, as whoever asks sees them."""
    stores = [*chain.from_iterable(map(_stores_of_one, owners))]
    return [*map(scoped.own_dict, stores)] if scoped.count() else stores


def _structure(stores: list[Any]) -> tuple[list[int], list[str], list[int]]:
    """Return names and identities of all that is held; equal ones mean equal structure.

    No bytecode runs for a single entry.
    """
    held = [*filter(None, stores)]
    if scoped.count():  # what a scope shows is not in a dict's storage
        held = [store.copy() if type(store) is scoped.ScopedDict else store for store in held]
    try:
        keys, values = [*chain.from_iterable(held)], chain.from_iterable(map(dict.values, held))
    except TypeError:  # scripted modules' dicts are none
        keys = [*chain.from_iterable(store.keys() for store in held)]
        values = chain.from_iterable(store.values() for store in held)
    # The lengths tell where the entries of one store end and those of the next begin.
    return [*map(len, stores)], keys, [*map(id, values)]


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
