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

from fcall.binding import ATTRIBUTE, bind
from fcall.substitution import Substitution, entry_of

__all__ = ["plan_for"]

PLANS_PER_MODULE = 16
"""How many plans, each for one tuple of names, are kept for a module. The oldest goes first."""


def plan_for(
    module: nn.Module, names: Sequence[str], *, tie_weights: bool, strict: bool
) -> Substitution:
    """Return the plan for giving ``names`` to ``module``; its errors are those of ``bind``."""
    key = (tuple(names), tie_weights, strict)
    plans = _plans_of(module)
    plan = plans.get(key)
    owners = plan.owners_if_unchanged() if plan is not None else None
    if plan is None or owners is None:
        plan = _CachedPlan(module, key)
        owners = list(module.modules())
        if plan.cacheable:
            plans.pop(key, None)
            while len(plans) >= PLANS_PER_MODULE:
                plans.pop(next(iter(plans)))
            plans[key] = plan
    return plan.on(owners)


_Key = tuple[tuple[str, ...], bool, bool]


class _CachedPlan:
    """A binding whose submodules are positions in a list of weak references."""

    def __init__(self, module: nn.Module, key: _Key) -> None:
        names, tie_weights, strict = key
        binding = bind(module, names, tie_weights=tie_weights, strict=strict)
        owners = list(module.modules())
        index = {id(owner): i for i, owner in enumerate(owners)}
        self.owners = [weakref.ref(owner) for owner in owners]
        self.structure = _structure(owners)
        self.slots = [(index[id(slot.owner)], slot.store, slot.key) for slot in binding.slots]
        self.kept = [
            (slot.name, index[id(slot.owner)], slot.store, slot.key) for slot in binding.kept
        ]
        self.rnns = [i for i, owner in enumerate(owners) if isinstance(owner, nn.RNNBase)]
        self.sources, self.homes, self.same = binding.sources, binding.homes, binding.same
        # Where a plain attribute is found depends on more than the structure tells.
        self.cacheable = all(slot.store != ATTRIBUTE for slot in binding.slots)

    def owners_if_unchanged(self) -> list[nn.Module] | None:
        """Return the submodules if the module is built as it was, else None."""
        owners = []
        for reference in self.owners:
            owner = reference()
            if owner is None:
                return None
            owners.append(owner)
        return owners if _structure(owners) == self.structure else None

    def on(self, owners: list[nn.Module]) -> Substitution:
        """Return the plan for the live ``owners``."""
        return Substitution(
            entries=[entry_of(owners[i], store, key) for i, store, key in self.slots],
            sources=self.sources,
            homes=self.homes,
            same=self.same,
            kept=[(name, entry_of(owners[i], store, key)) for name, i, store, key in self.kept],
            rnns=[owners[i] for i in self.rnns],  # type: ignore[misc]
        )


def _structure(owners: list[nn.Module]) -> list[Any]:
    """Return names and identities of all that ``owners`` hold; equal lists mean equal structure."""
    structure: list[Any] = []
    for owner in owners:
        for entries in (owner._parameters, owner._buffers, owner._modules):
            structure.append(len(entries))  # tells where one dict ends and the next begins
            structure.extend(entries)
            structure.extend(map(id, entries.values()))
    return structure


_plans: dict[int, tuple[weakref.ref[nn.Module], dict[_Key, _CachedPlan]]] = {}


def _plans_of(module: nn.Module) -> dict[_Key, _CachedPlan]:
    """Return the plans kept for ``module``; they go when it does."""
    # By id and not in a WeakKeyDictionary, since a module may define what it equals.
    number = id(module)
    known = _plans.get(number)
    if known is None or known[0]() is not module:
        known = (weakref.ref(module, lambda _: _plans.pop(number, None)), {})
        _plans[number] = known
    return known[1]
