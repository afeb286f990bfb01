"""The cached plan of an eager call: a binding kept from call to call, and the check that it holds.

Resolving names costs microseconds a name, and the result depends only on the names and on how the
module is built. So it is kept, with weak references to the submodules, beside the *structure* of
the module: each name and the identity of each tensor and submodule in the tree. A call compares the
structure and resolves anew when it differs: a submodule replaced, a tensor added, deleted, replaced
or retied, a parametrization put on or taken off.

Identities are compared as ids, which is sound although an id can be used again. The submodules are
alive while they are compared; and of the tensors only the pattern of equal ids matters, which tells
what is tied: two tensors that live at the same time never share an id.

The check has to look at each entry of each dict. It is one step for all of them (:func:`look
<fcall.passes.look>`), and what that finds is what the call needs: the dicts to be written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from fcall import scoped
from fcall.binding import ATTRIBUTE, Binding, bind, has_own_names, owner_at
from fcall.identity import identities
from fcall.passes import STORES, Looked, look, pick
from fcall.substitution import Layout, Substitution, entry_of, stores_of

__all__ = ["binding_for", "find", "plan_for", "resolve"]

PLANS_PER_MODULE = 16
"""How many plans, each for one tuple of names, are kept for a module. The oldest goes first."""

_Key = tuple[tuple[str, ...], bool, bool]


_new_tuple = tuple.__new__

Found = tuple[Substitution, Sequence[Any] | None, Sequence[Any]]
"""What a plan means for the live module; the module's own in each place, or None where more than
entries of dicts is written; the tensors in the kept places."""


def find(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> Found | None:
    """Return what giving ``names`` to ``module`` writes, or None if that has to be resolved."""
    known = _plans.get(id(module))
    if known is None or known[0]() is not module:
        return None
    plan = known[1].get((names, tie_weights, strict))
    return None if plan is None else plan.find()


def resolve(module: nn.Module, names: tuple[str, ...], *, tie_weights: bool, strict: bool) -> Found:
    """Return what :func:`find` is to return from now on; the errors are those of ``bind``."""
    return _new_plan(module, names, tie_weights, strict)[1]


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


class _Plan:
    """A binding, made concrete for modules that are built as those it was made from.

    Args:
        module: The module.
        binding: What is written, and what is kept.
        owners: The modules that the slots are in.
        dicts: What they have in :data:`STORES`, those of one after those of the other.
        held: All that is in these.
    """

    def __init__(
        self,
        module: nn.Module,
        binding: Binding,
        owners: Sequence[nn.Module],
        dicts: Sequence[Any],
        held: Sequence[Any],
    ) -> None:
        number = {id(owner): i for i, owner in enumerate(owners)}
        paths = {path: number[id(owner)] for path, owner in module.named_modules()}
        paths |= {s.path: number[id(owner_at(module, s.path))] for s in binding.slots}
        places = [(paths[slot.path], slot.store, slot.key) for slot in binding.slots]
        kept = [(slot.name, (paths[slot.path], slot.store, slot.key)) for slot in binding.kept]
        homes = [(i, kind) for i in range(len(owners)) for kind in STORES]
        number_of = {home: i for i, home in enumerate(homes)}
        keys_of = [[*entries.keys()] for entries in dicts]  # scripted modules' are no dicts
        entries = [(*home, key) for home, keys in zip(homes, keys_of) for key in keys]
        position = {entry: i for i, entry in enumerate(entries)}
        of_each = [number_of[i, kind] for i, kind, _ in places if kind in STORES]
        written = sorted({*of_each})
        groups = [homes[i] for i in written]
        group_of = {i: group for group, i in enumerate(written)}
        self.is_plain = len(of_each) == len(places) and all(
            type(dicts[number_of[i, kind]]) is dict and kind in vars(owners[i])
            for i, kind in groups
        )
        """Whether values go to entries of dicts, and nowhere else."""
        self.binding = binding
        self.rnns = [paths[path] for path in binding.rnns]
        self.order = _order([dicts[i] for i in written] if self.is_plain else [])
        of_places = [position[place] for place in places] if self.is_plain else []
        of_kept = [position[place] for _, place in kept]
        self.wanted = tuple(of_each), tuple(written), tuple(of_places), tuple(of_kept)
        references, keys = tuple(map(weakref.ref, owners)), tuple(key for _, _, key in entries)
        expected = references, tuple(map(len, dicts)), keys, identities(tuple(held))
        self.asked = *expected, *self.wanted
        number_of_place = {place: i for i, place in enumerate(places)}
        place_of_each = [
            number_of_place.get((*homes[i], key), -1) for i in written for key in keys_of[i]
        ]
        in_order = range(len(binding.homes))
        self.layout = Layout(
            places,
            keys=[key for _, _, key in places],
            sources=in_order if binding.sources == [*in_order] else binding.sources,
            homes=binding.homes,
            same=binding.same,
            kept=kept,
            groups=groups,
            group_of_each=[group_of[i] for i in of_each] if self.is_plain else [],
            place_of_each=place_of_each if self.is_plain else [],
        )

    def find(self) -> Found | None:
        """Return what the plan means for the modules, or None if they are built in another way."""
        # Without more than the tuple where it can be: to add to that takes long.
        looked = look(*self.asked, scoped.own_dict) if scoped.opened else look(*self.asked)
        return None if looked is None else self.found_in(looked)

    def found_in(self, looked: Looked) -> Found:
        """Return what the plan means for modules, of which that was picked."""
        owners, stores, dicts, originals, kept = looked
        rnns = [owners[i] for i in self.rnns] if self.rnns else ()
        if self.is_plain:
            lengths, order = self.order
            parts = self.layout, owners, stores, rnns, dicts, lengths, order
            # Not Substitution(...), which is a function of Python's, and in each call.
            return _new_tuple(Substitution, parts), originals, kept
        places = self.layout.places
        entries = [entry_of(owners[i], store, key) for i, store, key in places]
        stores = [store for store, _ in entries]
        dicts = [*{id(d): d for d in stores_of(entries)}.values()]
        return Substitution(self.layout, owners, stores, rnns, dicts, *_order(dicts)), None, kept


def _order(dicts: Sequence[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Return how many keys each has, and the keys of all, one dict after the other."""
    return [*map(len, dicts)], [*chain.from_iterable(dicts)]


def _current_plan(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[_Plan, Found]:
    plan = _plans_of(module).get((names, tie_weights, strict))
    found = None if plan is None else plan.find()
    if plan is None or found is None:
        return _new_plan(module, names, tie_weights, strict)
    return plan, found


def _new_plan(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[_Plan, Found]:
    binding = bind(module, names, tie_weights=tie_weights, strict=strict)
    registered = {id(owner): owner for owner in module.modules()}
    of_slots = {id(o): o for o in [owner_at(module, slot.path) for slot in binding.slots]}
    owners = [*(registered | of_slots).values()]
    dicts = [scoped.own_dict(getattr(owner, kind)) for owner in owners for kind in STORES]
    held = [*chain.from_iterable(entries.values() for entries in dicts)]
    plan = _Plan(module, binding, owners, dicts, held)
    # Where a plain attribute is found depends on more than the structure tells; so does a path
    # through one, and what a module calls its tensors itself.
    attributes = any(slot.store == ATTRIBUTE for slot in binding.slots)
    if not attributes and len(owners) == len(registered) and not has_own_names(module):
        plans, key = _plans_of(module), (names, tie_weights, strict)
        plans.pop(key, None)  # so that the newest is last
        for oldest in list(plans)[: 1 - PLANS_PER_MODULE]:  # other threads may do the same
            plans.pop(oldest, None)
        plans[key] = plan
    return plan, plan.found_in(pick(owners, dicts, held, *plan.wanted))


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
