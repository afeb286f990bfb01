"""The names of a body's placeholders: of the parameters, then of the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fcall import _torch

__all__ = ["argument_names", "input_names", "placeholder_name"]


def placeholder_name(name: str) -> str:
    """Return the name in a graph of the parameter or buffer ``name``."""
    return "p_" + name.replace(".", "_")


def input_names(
    module: nn.Module, method: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Name each leaf of the inputs after its argument, with a number where there are several."""
    labels = (*argument_names(type(module), method or "forward", len(args)), *kwargs)
    names = []
    for label, value in zip(labels, (*args, *kwargs.values())):
        count = len(_torch.pytree.tree_leaves(value))
        names += [label] if count == 1 else [f"{label}_{i}" for i in range(count)]
    return names


@_torch.evaluated_while_tracing
def argument_names(cls: type[nn.Module], method: str, count: int) -> tuple[str, ...]:
    """Return names for ``count`` positional arguments: the signature's, where there is one."""
    try:
        parameters = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):  # of the instance alone, a property, a builtin
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[i] if i < len(names) else f"args_{i}" for i in range(count))
