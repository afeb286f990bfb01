"""Names to slots: where in a module's tree each given value goes.

A *slot* is one entry of one dict of one submodule: ``module.encoder._parameters["weight"]``. Two
names can lead to one slot (a submodule reachable by two paths), and two slots can hold one tensor
(tied weights).

Everything here is plain Python over the live module, without a cache, so that Dynamo can trace it;
:mod:`fcall.plan` keeps the results between eager calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fcall import errors

__all__ = ["Binding", "Slot", "bind", "check_values", "is_tensor_like", "named_slots"]

COMPILED_PREFIX = "_orig_mod."
"""What ``torch.compile(module)`` puts before the names of the module it wraps."""

ATTRIBUTE = "attribute"
"""Store of a tensor that is no parameter or buffer but a plain attribute, existing or not."""

BYPASS = "parametrizations"
"""Store of a parametrized tensor under its plain name: the parametrization is bypassed."""


class Slot(NamedTuple):
    """One entry of one dict of one submodule."""

    owner: nn.Module
    """The submodule."""
    store: str
    """Its dict: ``"_parameters"``, ``"_buffers"``, :data:`ATTRIBUTE` or :data:`BYPASS`."""
    key: str
    """The entry of the dict."""
    name: str
    """The first of its dotted names; tells slots apart."""


class Binding(NamedTuple):
    """What a call writes where. Names are counted in the order in which they are given."""

    slots: list[Slot]
    """The slots to be written, each once."""
    sources: list[int]
    """For each slot the number of the name whose value goes there."""
    homes: list[int]
    """For each name the position, in ``slots``, of its own slot, which holds its new value after
    the call."""
    same: list[list[str]]
    """Groups of names that need one and the same value."""
    kept: list[Slot]
    """The slots of registered tensors that stay the module's own."""


def is_tensor_like(value: Any) -> bool:
    """Whether ``value`` is a tensor or overrides torch functions as one does."""
    return isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__")


def named_slots(module: nn.Module) -> dict[str, Slot]:
    """Return the slot of every registered tensor of ``module``, by each of its names.

    The order is that of ``named_parameters(remove_duplicate=False)``, then the same for buffers.
    """
    first_paths: dict[Any, str] = {}
    owners = []
    for path, owner in module.named_modules(remove_duplicate=False):
        owners.append((path, first_paths.setdefault(_identity(owner), path), owner))
    slots = {}
    for store in ("_parameters", "_buffers"):
        for path, first_path, owner in owners:
            for key, tensor in getattr(owner, store).items():
                if tensor is not None:
                    slots[_join(path, key)] = Slot(owner, store, key, _join(first_path, key))
    return slots


def bind(module: nn.Module, names: Sequence[str], *, tie_weights: bool, strict: bool) -> Binding:
    """Resolve ``names`` to slots of ``module``.

    Args:
        module: The module whose state is to be substituted. Not mutated.
        names: The names that values are given for.
        tie_weights: Whether a value also goes to the slots tied with its own.
        strict: Whether ``names`` must cover all of the module's registered tensors and no more.

    Raises:
        InvalidNameError: a name is not a dotted path.
        StrictKeysError: ``strict``, and names are missing or unexpected.
        UnknownPathError: a name leads through a submodule that does not exist.
    """
    slots = named_slots(module)
    plain = {name.replace(COMPILED_PREFIX, ""): name for name in slots}
    group_of = _tied_names(slots) if tie_weights else {n: s.name for n, s in slots.items()}

    own_slots: list[Slot] = []
    unregistered: list[str] = []
    givers: dict[str, list[str]] = {}
    for name in names:
        _check_name(name)
        registered = name if name in slots else plain.get(name.replace(COMPILED_PREFIX, ""))
        if registered is None:
            unregistered.append(name)
            if not strict:
                own_slots.append(_locate(module, name, slots))
        else:
            givers.setdefault(group_of[registered], []).append(name)
            own_slots.append(slots[registered])
    if strict:
        missing = [name for name in slots if group_of[name] not in givers]
        if missing or unregistered:
            type_name = type(module).__name__
            errors.fail(errors.StrictKeysError, type_name, missing, unregistered, list(slots))

    number = {name: i for i, name in enumerate(names)}
    written: dict[str, Slot] = {}
    sources = []
    kept: dict[str, Slot] = {}
    for name, slot in slots.items():
        givers_of_slot = givers.get(group_of[name])
        if givers_of_slot is None:
            kept[slot.name] = slot
        elif slot.name not in written:
            written[slot.name] = slot
            sources.append(number[givers_of_slot[0]])
    for name, slot in zip(names, own_slots):
        if slot.name not in written:
            written[slot.name] = slot
            sources.append(number[name])
    position = {name: i for i, name in enumerate(written)}
    return Binding(
        slots=list(written.values()),
        sources=sources,
        homes=[position[slot.name] for slot in own_slots],
        same=[group for group in givers.values() if len(group) > 1],
        kept=list(kept.values()),
    )


def check_values(
    module: nn.Module,
    given: Mapping[str, Any],
    same: Iterable[Sequence[str]],
    *,
    tie_weights: bool,
) -> None:
    """Check that the values are tensors, and the same where slots need one value.

    Raises:
        NotATensorError: a value is not a tensor.
        SharedSlotError: two paths to one submodule have different values, ``tie_weights=False``.
        TiedValuesError: tied names have different values.
    """
    for name, value in given.items():
        if not is_tensor_like(value):
            errors.fail(errors.NotATensorError, name, type(value).__name__)
    for group in same:
        first = given[group[0]]
        if any(given[name] is not first for name in group):
            error = errors.TiedValuesError if tie_weights else errors.SharedSlotError
            errors.fail(error, sorted(group), type(module).__name__)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _identity(thing: Any) -> Any:
    # Dynamo has no id() of what it traces, but compares keys of a dict by identity.
    return thing if torch.compiler.is_dynamo_compiling() else id(thing)


def _tied_names(slots: Mapping[str, Slot]) -> dict[str, str]:
    """Map each name to the first name of the same tensor."""
    first_names: dict[Any, str] = {}
    return {
        name: first_names.setdefault(_identity(getattr(slot.owner, slot.store)[slot.key]), name)
        for name, slot in slots.items()
    }


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "" in name.split("."):
        errors.fail(errors.InvalidNameError, name)


def _locate(module: nn.Module, name: str, known: Iterable[str]) -> Slot:
    """Find the slot of a name that no registered tensor has, as ``torch.func`` does."""
    *path, key = name.split(".")
    owner = module
    for part in path:
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            errors.fail(errors.UnknownPathError, type(module).__name__, name, list(known))
        owner = child
    if is_parametrized(owner, key):
        return Slot(owner, BYPASS, key, name)
    for store in ("_parameters", "_buffers"):
        if key in getattr(owner, store):  # registered as None, such as a bias that is switched off
            return Slot(owner, store, key, name)
    value = getattr(owner, key, None)
    if value is not None and not is_tensor_like(value):
        errors.fail(errors.NotATensorSlotError, name, type(module).__name__, type(value).__name__)
    return Slot(owner, ATTRIBUTE, key, name)
