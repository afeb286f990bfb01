"""Names to slots: where in a module's tree each given value goes.

A *slot* is one entry of one dict of one submodule: ``module.encoder._parameters["weight"]``. Two
names can lead to one slot (a submodule reachable by two paths), and two slots can hold one tensor
(tied weights).

A binding is plain data, without a reference to the module: :mod:`fcall.plan` keeps it from call to
call, and :mod:`fcall.operator.dynamo` makes it a constant of a trace. Where neither can, Dynamo
traces :func:`bind` itself, which is why it is simple code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fcall import errors

__all__ = [
    "Binding",
    "Slot",
    "bind",
    "bind_for_graph",
    "check_values",
    "is_tensor_like",
    "kept_on_meta",
    "owner_at",
]

COMPILED_PREFIX = "_orig_mod."
"""What ``torch.compile(module)`` puts before the names of the module it wraps."""

ATTRIBUTE = "attribute"
"""Store of a tensor that is no parameter or buffer but a plain attribute, existing or not."""

BYPASS = "parametrizations"
"""Store of a parametrized tensor under its plain name: the parametrization is bypassed."""


class Slot(NamedTuple):
    """One entry of one dict of one submodule."""

    path: str
    """The first path to the submodule."""
    store: str
    """Its dict: ``"_parameters"``, ``"_buffers"``, :data:`ATTRIBUTE` or :data:`BYPASS`."""
    key: str
    """The entry of the dict."""

    @property
    def name(self) -> str:
        """The first of its names; tells slots apart."""
        return _join(self.path, self.key)


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
    rnns: list[str]
    """Paths of submodules that keep a second list of their weights."""


def is_tensor_like(value: Any) -> bool:
    """Whether ``value`` is a tensor or overrides torch functions as one does."""
    return isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__")


def owner_at(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``."""
    owner = module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    return owner


def _named_tensors(module: nn.Module) -> list[tuple[str, Slot, Any]]:
    """Return name, slot and tensor of every registered tensor, once for each of its names.

    The order is that of ``named_parameters(remove_duplicate=False)``, then the same for buffers.
    """
    first_paths: dict[Any, str] = {}
    owners = []
    for path, owner in module.named_modules(remove_duplicate=False):
        owners.append((path, first_paths.setdefault(_identity(owner), path), owner))
    named = []
    for store in ("_parameters", "_buffers"):
        for path, first_path, owner in owners:
            for key, tensor in getattr(owner, store).items():
                if tensor is not None:
                    named.append((_join(path, key), Slot(first_path, store, key), tensor))
    return named


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
    named = _named_tensors(module)
    slots = {name: slot for name, slot, _ in named}
    plain = {name.replace(COMPILED_PREFIX, ""): name for name in slots}
    if tie_weights:  # names of one tensor need one value
        first_names: dict[Any, str] = {}
        group_of = {n: first_names.setdefault(_identity(tensor), n) for n, _, tensor in named}
    else:  # only names of one slot do
        group_of = {name: slot.name for name, slot, _ in named}

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
        rnns=[path for path, owner in module.named_modules() if isinstance(owner, nn.RNNBase)],
    )


def bind_for_graph(
    module: nn.Module, names: Sequence[str], tie_weights: bool, strict: bool
) -> tuple[Binding, list[str]]:
    """Return a binding that keeps nothing, and the names of what the module keeps on meta.

    In a graph a body finds by itself which of the module's own tensors it uses. To look at the
    others would make inputs of them.
    """
    binding = bind(module, names, tie_weights=tie_weights, strict=strict)
    return binding._replace(kept=[]), kept_on_meta(module, binding)


def kept_on_meta(module: nn.Module, binding: Binding) -> list[str]:
    """Return the names of the tensors on meta among those that stay the module's own."""
    return [
        slot.name
        for slot in binding.kept
        if getattr(owner_at(module, slot.path), slot.store)[slot.key].is_meta
    ]


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


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "" in name.split("."):
        errors.fail(errors.InvalidNameError, name)


def _locate(module: nn.Module, name: str, known: Iterable[str]) -> Slot:
    """Find the slot of a name that no registered tensor has, as ``torch.func`` does."""
    path, _, key = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            errors.fail(errors.UnknownPathError, type(module).__name__, name, list(known))
        owner = child
    if is_parametrized(owner, key):
        return Slot(path, BYPASS, key)
    for store in ("_parameters", "_buffers"):
        if key in getattr(owner, store):  # registered as None, such as a bias that is switched off
            return Slot(path, store, key)
    value = getattr(owner, key, None)
    if value is not None and not is_tensor_like(value):
        errors.fail(errors.NotATensorSlotError, name, type(module).__name__, type(value).__name__)
    return Slot(path, ATTRIBUTE, key)
