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
from typing import Any

from torch import nn

from fcall.binding import ATTRIBUTE, Binding, bind, owner_at
from fcall.substitution import Substitution, entry_of

__all__ = ["binding_for", "plan_for"]

PLANS_PER_MODULE = 16
"""How many plans, each for one tuple of names, are kept for a module. The oldest goes first."""

_Key = tuple[tuple[str, ...], bool, bool]


def plan_for(
    module: nn.Module, names: Sequence[str], *, tie_weights: bool, strict: bool
) -> Substitution:
    """Return what giving ``names`` to ``module`` writes; the errors are those of ``bind``."""
    plan, owners = _current_plan(module, tuple(names), tie_weights, strict)
    return Substitution(
        entries=[entry_of(owners[i], store, key) for i, store, key in plan.slots],
        sources=plan.binding.sources,
        homes=plan.binding.homes,
        same=plan.binding.same,
        kept=[(name, entry_of(owners[i], store, key)) for name, i, store, key in plan.kept],
        rnns=[owners[i] for i in plan.rnns],  # type: ignore[misc]
    )


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
        self.structure = _structure(owners)
        number = {id(owner): i for i, owner in enumerate(owners)}
        paths = {path: number[id(owner)] for path, owner in module.named_modules()}
        # Where a plain attribute is found depends on more than the structure tells.
        self.cacheable = all(slot.store != ATTRIBUTE for slot in self.binding.slots)
        for slot in self.binding.slots:
            if slot.path not in paths:  # a module in a plain attribute
                self.cacheable = False
                paths[slot.path] = len(owners)
                owners.append(owner_at(module, slot.path))
        self.owners = [weakref.ref(owner) for owner in owners]
        self.slots = [(paths[slot.path], slot.store, slot.key) for slot in self.binding.slots]
        self.kept = [
            (slot.name, paths[slot.path], slot.store, slot.key) for slot in self.binding.kept
        ]
        self.rnns = [paths[path] for path in self.binding.rnns]

    def live_owners(self) -> list[nn.Module]:
        """Return the submodules that are still there."""
        return [owner for reference in self.owners if (owner := reference()) is not None]


def _current_plan(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[_Plan, list[nn.Module]]:
    plans = _plans_of(module)
    key = (names, tie_weights, strict)
    plan = plans.get(key)
    if plan is not None:
        owners = plan.live_owners()
        if len(owners) == len(plan.owners) and _structure(owners) == plan.structure:
            return plan, owners
    plan = _Plan(module, names, tie_weights, strict)
    if plan.cacheable:
        plans.pop(key, None)  # so that the newest is last
        for oldest in list(plans)[: 1 - PLANS_PER_MODULE]:  # other threads may do the same
            plans.pop(oldest, None)
        plans[key] = plan
    return plan, plan.live_owners()


def _structure(owners: list[nn.Module]) -> list[Any]:
    """Return names and identities of all that ``owners`` hold; equal lists mean equal structure."""
    structure: list[Any] = []
    for owner in owners:
        parameters, buffers, modules = owner._parameters, owner._buffers, owner._modules
        # The lengths tell where the entries of one dict end and those of the next begin.
        structure.append((len(parameters), len(buffers), len(modules)))
        for entries in (parameters, buffers, modules):
            if entries:
                structure.extend(entries.keys())  # scripted modules' dicts have no iterator
                structure.extend(map(id, entries.values()))
    return structure


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
