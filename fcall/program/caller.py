"""A module as ``torch.export`` is to see it: without state, called with its weights first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fcall import errors
from fcall.call import call_inlined

__all__ = ["Caller", "output_and_state", "output_only", "unused_name"]

Finish = Callable[[Any, dict[str, Tensor], dict[str, Tensor]], Any]


class Caller(nn.Module):
    """A stateless module whose ``forward(weights, *args, **kwargs)`` calls another functionally.

    Args:
        module: The module to call. Not a submodule.
        method: Its method to call; ``None`` for the module itself.
        finish: What makes the result of the output, the given state, and that after the call.
        tie_weights: As for :func:`fcall.functional_call`.
        kwargs_names: The names of keyword arguments that it will be called with.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str | None,
        finish: Finish,
        *,
        tie_weights: bool,
        kwargs_names: Iterable[str],
    ) -> None:
        super().__init__()
        signature = inspect.signature(getattr(module, method or "forward"))
        inputs = list(signature.parameters.values())
        # torch.export names placeholders after the arguments: p["l1.weight"] becomes p_l1_weight.
        self.weights_name = unused_name({*signature.parameters, *kwargs_names})
        weights = inspect.Parameter(self.weights_name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if inputs and inputs[0].kind is inspect.Parameter.POSITIONAL_ONLY:
            weights = weights.replace(kind=inspect.Parameter.POSITIONAL_ONLY)

        def forward(weights: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
            state = dict(weights)
            out = call_inlined(module, state, args, kwargs, tie_weights=tie_weights, method=method)
            return finish(out, weights, state)

        self._input_names = [p.name for p in inputs if p.kind <= p.POSITIONAL_OR_KEYWORD]
        forward.__signature__ = inspect.Signature([weights, *inputs])  # type: ignore[attr-defined]
        self.forward = forward

    def export(
        self,
        weights: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
        *,
        strict: bool = False,
    ) -> ExportedProgram:
        """Return what ``torch.export`` makes of a call; the sizes of the weights are fixed.

        Args:
            weights: Examples by name.
            args: Examples.
            kwargs: Examples.
            dynamic_shapes: Of ``args`` and ``kwargs`` alone.
            strict: As for ``torch.export.export``.
        """
        shapes: dict[str, Any] | tuple[Any, ...] | None = None
        if isinstance(dynamic_shapes, Mapping):
            shapes = {self.weights_name: dict.fromkeys(weights), **dynamic_shapes}
        elif dynamic_shapes is not None:
            shapes = (dict.fromkeys(weights), *dynamic_shapes)
        return torch.export.export(
            self, (weights, *args), kwargs, dynamic_shapes=shapes, strict=strict
        )

    def arg_names(self, count: int) -> tuple[str, ...]:
        """Return names for ``count`` positional arguments after the weights."""
        more = [f"args_{i}" for i in range(count)]
        return (*self._input_names[:count], *more[len(self._input_names) :])


def output_only(out: Any, given: dict[str, Tensor], state: dict[str, Tensor]) -> Any:
    """Write reassigned state into the given tensors, for a graph that has no dict to put it in."""
    for name, value in given.items():
        if state[name] is not value:
            _write_into(name, value, state[name])
    return out


def output_and_state(
    out: Any, given: dict[str, Tensor], state: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Return the output, and the state that was reassigned."""
    return out, {name: state[name] for name in given if state[name] is not given[name]}


def unused_name(used: Collection[str]) -> str:
    """Return a name for the argument that holds the weights."""
    name = "p"
    while name in used:
        name = "weights" if name == "p" else name + "_"
    return name


def _write_into(name: str, given: Tensor, new: Tensor) -> None:
    if (given.shape, given.dtype, given.device) != (new.shape, new.dtype, new.device):
        before, after = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (given, new))
        errors.fail(errors.StateChangedError, name, before, after)
    given.copy_(new)
