"""Names to slots: where in a module's tree each given value goes.

A *slot* is one entry of one dict of one submodule: ``module.encoder._parameters["weight"]``. Two
names can lead to one slot (a submodule reachable by two paths), and two slots can hold one tensor
(tied weights).

A binding is plain data, without a reference to the module: :mod:`fcall.plan` keeps it from call to
call, and :mod:`fcall.operator.dynamo_names` makes it a constant of a trace. Where neither can,
Dynamo traces :func:`bind` itself, which is why it is simple code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from fcall import errors
from fcall.passes import are_plain

__all__ = [
    "Binding",
    "Slot",
    "are_real_tensors",
    "bind",
    "bind_for_graph",
    "check_values",
    "first_of_ties",
    "has_own_names",
    "is_tensor_like",
    "kept_on_meta",
    "owner_at",
    "refuse_lazy",
]

COMPILED_PART = "_orig_mod"
"""The attribute in which ``torch.compile(module)`` keeps the module it wraps."""

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


TENSORS = (torch.Tensor, nn.Parameter)
"""The classes of nearly all values."""

IS_META: Any = torch.Tensor.is_meta
"""The flag of tensors that hold no values, as the class has it."""


def is_tensor_like(value: Any) -> bool:
    """Whether ``value`` is a tensor or overrides torch functions as one does."""
    return isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__")


def are_real_tensors(values: Sequence[Any]) -> bool:
    """Whether all are plain tensors or parameters, and none is on meta."""
    return are_plain(values, TENSORS, IS_META)


def owner_at(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``."""
    owner = module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    return owner


def _named_tensors(
    owners: Iterable[tuple[str, nn.Module]], first_paths: Mapping[Any, str]
) -> list[tuple[str, Slot, Any]]:
    """Return name, slot and tensor of every registered tensor, once for each of its names.

    The order is that of ``named_parameters(remove_duplicate=False)``, then the same for buffers.
    """
    named = []
    for store in ("_parameters", "_buffers"):
        for path, owner in owners:
            for key, tensor in getattr(owner, store).items():
                if tensor is not None:
                    slot = Slot(first_paths[_identity(owner)], store, key)
                    named.append((_join(path, key), slot, tensor))
    return named


def _walk(
    module: nn.Module, path: str, above: list[nn.Module], found: list[tuple[str, nn.Module]]
) -> None:
    """Add to ``found`` each path to each submodule, round no circle more than once."""
    found.append((path, module))
    for key, child in module._modules.items():
        if child is not None and not any(child is module for module in (*above, module)):
            _walk(child, _join(path, key), [*above, module], found)


def _groups(named: Sequence[tuple[str, Slot, Any]], tie_weights: bool) -> dict[str, str]:
    """Map each name to the first of those that need one value with it."""
    if not tie_weights:  # the names of one slot
        return {name: slot.name for name, slot, _ in named}
    first_names: dict[Any, str] = {}  # the names of one tensor
    return {name: first_names.setdefault(_identity(tensor), name) for name, _, tensor in named}


def has_own_names(module: nn.Module) -> bool:
    """Whether ``module`` has its own say in how its tensors are called.

    A wrapper that hides itself does, as those for checkpointing: it leaves the attribute in which
    it keeps the wrapped module out of the names.
    """
    kind = type(module)
    return (
        kind.named_parameters is not nn.Module.named_parameters
        or kind.named_buffers is not nn.Module.named_buffers
    )


def _own_names(module: nn.Module, slot_of: Mapping[Any, Slot]) -> dict[str, Slot]:
    """Return the slots of the names that ``module`` gives to its tensors, if it has its own say."""
    if not has_own_names(module):
        return {}
    named = [*module.named_parameters(), *module.named_buffers()]
    return {n: slot_of[_identity(t)] for n, t in named if _identity(t) in slot_of}


def _find(
    module: nn.Module,
    names: Sequence[str],
    slots: Mapping[str, Slot],
    first_paths: Mapping[Any, str],
    slot_of: Mapping[Any, Slot],
    *,
    look_further: bool,
) -> tuple[dict[int, Slot], list[str]]:
    """Return the slot of each of ``names``, by its number, and those that are not registered."""
    slots = {**_own_names(module, slot_of), **slots}
    plain = {_without_compiled(name): slot for name, slot in slots.items()}
    found = {}
    unexpected = []
    for number, name in enumerate(names):
        _check_name(name)
        slot = slots.get(name) or plain.get(_without_compiled(name))
        if slot is None:
            unexpected.append(name)
            if look_further:
                slot = _locate(module, name, slots, first_paths, slot_of)
        if slot is not None:
            found[number] = slot
    return found, unexpected


def refuse_lazy(module: nn.Module, named: Iterable[tuple[str, Any]]) -> None:
    """Refuse tensors, given with their names, that a lazy module has not made yet.

    Raises:
        LazyModuleError: with the names of all of them.
    """
    lazy = (UninitializedParameter, UninitializedBuffer)
    names = [name for name, tensor in named if isinstance(tensor, lazy)]
    if names:
        errors.fail(errors.LazyModuleError, type(module).__name__, sorted(names))


def bind(module: nn.Module, names: Sequence[str], *, tie_weights: bool, strict: bool) -> Binding:
    """Resolve ``names`` to slots of ``module``.

    Args:
        module: The module whose state is to be substituted. Not mutated.
        names: The names that values are given for.
        tie_weights: Whether a value also goes to the slots tied with its own.
        strict: Whether ``names`` must cover all of the module's registered tensors and no more.

    Raises:
        InvalidNameError: a name is not a dotted path.
        LazyModuleError: a name is of a parameter that a lazy module has not made yet.
        NotATensorSlotError: a name is of an attribute that is not a tensor.
        PathThroughValueError: a name leads through what is no submodule.
        ReadOnlyAttributeError: a name is of a property without a setter.
        StrictKeysError: ``strict``, and names are missing or unexpected.
        UnknownPathError: a name leads through a submodule that does not exist.
    """
    owners: list[tuple[str, nn.Module]] = []
    _walk(module, "", [], owners)
    first_paths: dict[Any, str] = {}
    for path, owner in owners:
        first_paths.setdefault(_identity(owner), path)
    named = _named_tensors(owners, first_paths)
    slots = {name: slot for name, slot, _ in named}
    slot_of = {_identity(tensor): slot for _, slot, tensor in reversed(named)}  # the first of ties
    group_of = _groups(named, tie_weights)

    found, unexpected = _find(module, names, slots, first_paths, slot_of, look_further=not strict)
    givers: dict[str, list[int]] = {}
    for number, slot in found.items():
        givers.setdefault(group_of.get(slot.name, slot.name), []).append(number)
    missing = [name for name in slots if group_of[name] not in givers]
    if strict and (missing or unexpected):
        type_name = type(module).__name__
        errors.fail(errors.StrictKeysError, type_name, missing, unexpected, list(slots))
    refuse_lazy(module, [(n, tensor) for n, _, tensor in named if group_of[n] in givers])

    kept: dict[str, Slot] = {}
    written: dict[str, tuple[Slot, int]] = {}
    for name, slot in slots.items():
        if group_of[name] in givers:
            written[slot.name] = slot, givers[group_of[name]][0]
        else:
            kept[slot.name] = slot
    for number, slot in found.items():
        written.setdefault(slot.name, (slot, number))
    position = {name: i for i, name in enumerate(written)}
    bypassed = [_join(slot.path, f"{BYPASS}.{slot.key}") for slot, _ in written.values()]
    return Binding(
        slots=[slot for slot, _ in written.values()],
        sources=[number for _, number in written.values()],
        homes=[position[found[number].name] for number in range(len(names))],
        same=[[names[number] for number in group] for group in givers.values() if len(group) > 1],
        kept=[slot for slot in kept.values() if slot.path not in bypassed],
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
) -> list[str]:
    """Check that the values are tensors, and the same where slots need one value.

    Returns:
        The names of those on meta.

    Raises:
        NotATensorError: a value is not a tensor.
        SharedSlotError: two paths to one submodule have different values, ``tie_weights=False``.
        TiedValuesError: tied names have different values.
    """
    are_real = not torch.compiler.is_dynamo_compiling() and are_real_tensors([*given.values()])
    if not are_real and not {*TENSORS}.issuperset(map(type, given.values())):
        for name, value in given.items():
            if not is_tensor_like(value):
                errors.fail(errors.NotATensorError, name, type(value).__name__)
    for group in same:
        first = given[group[0]]
        if any(given[name] is not first for name in group):
            error = errors.TiedValuesError if tie_weights else errors.SharedSlotError
            errors.fail(error, sorted(group), type(module).__name__)
    if are_real:
        return []
    # As a device, which leaves nothing in a traced graph.
    tensors = [(name, value) for name, value in given.items() if isinstance(value, torch.Tensor)]
    return [name for name, value in tensors if value.device.type == "meta"]


def first_of_ties(given: Mapping[str, Any], binding: Binding) -> dict[str, Any]:
    """Return ``given`` without the names that need the value of an earlier one."""
    repeated = {name for group in binding.same for name in group[1:]}
    return {name: value for name, value in given.items() if name not in repeated}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _into_compiled(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Go on to the module that ``torch.compile`` wrapped, if it is one."""
    while COMPILED_PART in module._modules:
        module, path = getattr(module, COMPILED_PART), _join(path, COMPILED_PART)
    return module, path


def _without_compiled(name: str) -> str:
    return ".".join([part for part in name.split(".") if part != COMPILED_PART])


def _identity(thing: Any) -> Any:
    # Dynamo has no id() of what it traces, but compares keys of a dict by identity.
    return thing if torch.compiler.is_dynamo_compiling() else id(thing)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "" in name.split("."):
        errors.fail(errors.InvalidNameError, name)


def _locate(
    module: nn.Module,
    name: str,
    known: Iterable[str],
    first_paths: Mapping[Any, str],
    slot_of: Mapping[Any, Slot],
) -> Slot:
    """Find the slot of a name that no registered tensor has, as ``torch.func`` does."""
    *parts, key = _without_compiled(name).split(".")
    owner, path = _into_compiled(module, "")
    for part in parts:
        if not hasattr(owner, part):
            errors.fail(errors.UnknownPathError, type(module).__name__, name, list(known))
        child = getattr(owner, part)
        if not isinstance(child, nn.Module):
            kind = type(child).__name__
            errors.fail(errors.PathThroughValueError, type(module).__name__, name, part, kind)
        owner, path = _into_compiled(child, _join(path, part))
    path = first_paths.get(_identity(owner), path)
    if is_parametrized(owner, key):
        return Slot(path, BYPASS, key)
    for store in ("_parameters", "_buffers"):
        if key in getattr(owner, store):  # is None, or the path is not a registered one
            return Slot(path, store, key)
    value = getattr(owner, key, None)
    if value is not None and not is_tensor_like(value):
        errors.fail(errors.NotATensorSlotError, name, type(module).__name__, type(value).__name__)
    of_class = getattr(type(owner), key, None)
    if isinstance(of_class, property) and of_class.fset is None:
        errors.fail(errors.ReadOnlyAttributeError, name, type(owner).__name__)
    if key not in owner.__dict__ and of_class is None and _identity(value) in slot_of:
        return slot_of[_identity(value)]  # a __getattr__ leads to it
    return Slot(path, ATTRIBUTE, key)
