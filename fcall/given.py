"""What a call is given: merged, checked, given its place in the module, and written back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from fcall import _torch, errors
from fcall.binding import are_real_tensors, check_values
from fcall.plan import find, resolve
from fcall.substitution import Substitution

__all__ = [
    "Prepared",
    "Weights",
    "merge",
    "prepare",
    "refuse_gradients_in_export",
    "refuse_meta",
    "refuse_unsupported",
    "write_back",
]

Weights = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Values for parameters and buffers by name, in one mapping or in several without common names."""

Prepared = tuple[tuple[str, ...], tuple[Any, ...], Substitution, Sequence[Any] | None]
"""The names given; their values; where these go; and what stands there now, if it is known."""


def prepare(
    module: nn.Module,
    dicts: Weights,
    inputs: Any,
    *,
    tie_weights: bool,
    strict: bool,
    method: str | None = None,
) -> Prepared:
    """Check what is given, outside of Dynamo's traces, and find where it goes.

    Args:
        module: The module to be called.
        dicts: The weights.
        inputs: Its other inputs, nested as they come.
        tie_weights: As for :func:`fcall.functional_call`.
        strict: Also.
        method: Also.
    """
    if method is not None or _torch.is_traced_by_jit():
        refuse_unsupported(module, method)
    if is_exporting():
        refuse_gradients_in_export(type(module).__name__)
    given = merge(dicts)
    names, values = tuple(given), tuple(given.values())
    found = find(module, names, tie_weights, strict)
    if found is None:
        refuse_unsupported(module, method)
        found = resolve(module, names, tie_weights=tie_weights, strict=strict)
    substitution, originals, kept = found
    on_meta: Sequence[str] = ()
    if kept and not are_real_tensors(kept):
        places = substitution.layout.kept
        on_meta = [name for (name, _), own in zip(places, kept) if own.is_meta]
    given_on_meta: Sequence[str] = ()
    same = substitution.layout.same
    if same or not are_real_tensors(values):
        given_on_meta = check_values(module, given, same, tie_weights=tie_weights)
    if on_meta or given_on_meta:
        refuse_meta(module, on_meta, given_on_meta, (values, inputs))
    return names, values, substitution, originals


def merge(dicts: Weights) -> dict[str, Any]:
    """Return one dict of all that is given."""
    if type(dicts) is dict or isinstance(dicts, Mapping):
        return dict(dicts)
    if not isinstance(dicts, Sequence) or isinstance(dicts, (str, bytes)):
        errors.fail(errors.InvalidDictsError, type(dicts).__name__)
    given: dict[str, Any] = {}
    for part in dicts:
        if not isinstance(part, Mapping):
            errors.fail(errors.InvalidDictsError, f"a sequence with a {type(part).__name__}")
        for name, value in part.items():
            if name in given:
                errors.fail(errors.DuplicateNameError, name)
            given[name] = value
    return given


def write_back(dicts: Weights, names: Sequence[str], changed: Mapping[int, Any]) -> None:
    """Replace what the module reassigned, in the mapping that the name came in."""
    for number, value in changed.items():
        name = names[number]
        for part in [dicts] if isinstance(dicts, Mapping) else dicts:
            if name in part:
                if not isinstance(part, MutableMapping):
                    errors.fail(errors.ReadOnlyMappingError, name, type(part).__name__)
                part[name] = value


def refuse_unsupported(module: nn.Module, method: str | None) -> None:
    """Refuse what is no module, or whose state is out of Python's reach."""
    if (
        isinstance(module, nn.Module)
        and not isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
        and not torch.jit.is_tracing()
        and (method is None or callable(getattr(module, method, None)))
    ):
        return
    name = type(module).__name__
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        advice = "Its tensors are out of Python's reach: call the module it was scripted from."
        errors.fail(errors.UnsupportedModuleError, f"the Jitted module {name}", advice)
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        advice = "Use torch.export or fcall.export in place of torch.jit."
        errors.fail(errors.UnsupportedModuleError, "Jitted modules (torch.jit is tracing)", advice)
    if isinstance(module, nn.DataParallel):
        advice = "Call module.module, or use DistributedDataParallel."
        errors.fail(errors.UnsupportedModuleError, f"the nn.DataParallel module {name}", advice)
    if not isinstance(module, nn.Module):
        errors.fail(errors.NotAModuleError, name)
    errors.fail(errors.UnknownMethodError, name, method, dir(type(module)))


def refuse_gradients_in_export(title: str) -> None:
    """Refuse what torch.export records wrongly without a word."""
    if _torch.exports_gradients():
        errors.fail(errors.ExportedGradientError, title)


def refuse_meta(module: nn.Module, own: Sequence[str], values: Sequence[str], given: Any) -> None:
    """Refuse to mix real tensors with tensors on meta: the module's own, or values."""
    leaves = _torch.pytree.tree_leaves(given)
    if any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in leaves):
        whose = "given no value" if own else "given a value there"
        errors.fail(errors.MetaTensorError, type(module).__name__, whose, sorted(own or values))
