"""``export``: a ``torch.export.ExportedProgram`` whose inputs are the weights, then the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fcall import errors
from fcall.binding import check_values, first_of_ties
from fcall.given import Weights, merge, refuse_unsupported
from fcall.plan import binding_for
from fcall.program.caller import Caller, output_only

__all__ = ["export"]


def export(
    module: nn.Module,
    parameter_and_buffer_dicts: Weights,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Mapping[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    tie_weights: bool = True,
    strict: bool = False,
    method: str | None = None,
    export_strict: bool = False,
) -> ExportedProgram:
    """Export a call of ``module`` with its parameters and buffers as inputs of the graph.

    The program is called as ``program.module()(params, *args, **kwargs)``, with one dict that has
    the same names as here, in the same order, each value with the shape and dtype it has here. Its
    placeholders are ``p_`` and the name for each of the weights, then the inputs. It owns no
    parameters and no buffers. ``torch.export.save`` keeps it as it is, its example inputs included.

    Args:
        module: The module to export. Not changed, and not needed afterwards.
        parameter_and_buffer_dicts: Example values for all parameters and buffers, as for
            :func:`fcall.functional_call`; of tied names the first given is the input. Not mutated.
        args: Example positional arguments: a tuple, or a single value that is not a tuple.
        kwargs: Example keyword arguments.
        dynamic_shapes: Which dimensions of the inputs vary, as :func:`torch.export.export` takes it
            for the module itself: by argument name, or in the order of the arguments. The weights'
            shapes are fixed.
        tie_weights: As for :func:`fcall.functional_call`.
        strict: As for :func:`fcall.functional_call`.
        method: The method to export; ``None`` is the module itself, with its hooks.
        export_strict: As ``strict`` of ``torch.export.export``: whether Dynamo reads the code of
            the module, and what is no graph is an error. The graph is functional then.

    Returns:
        A program whose inputs are all user inputs. State that the module mutates or reassigns is
        written into the tensors that the program is called with.

    Raises:
        MissingValuesError: a parameter or buffer has no value (a ``RuntimeError``).
        StateChangedError: the module reassigns a tensor with one of another shape or dtype
            (a ``RuntimeError``).
        FcallError: those of :func:`fcall.functional_call`.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> params = dict(model.named_parameters())
        >>> batch = torch.export.Dim("batch")
        >>> program = fcall.export(model, params, torch.ones(4, 3), dynamic_shapes=({0: batch},))
        >>> [node.name for node in program.graph.find_nodes(op="placeholder")]
        ['p_weight', 'p_bias', 'input']
        >>> program.module()({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, torch.ones(1, 3))
        tensor([[3., 3.]])
    """
    refuse_unsupported(module, method)
    params = merge(parameter_and_buffer_dicts)
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    binding = binding_for(module, tuple(params), tie_weights=tie_weights, strict=strict)
    if binding.kept:
        missing = sorted(slot.name for slot in binding.kept)
        errors.fail(errors.MissingValuesError, type(module).__name__, missing)
    check_values(module, params, binding.same, tie_weights=tie_weights)
    params = first_of_ties(params, binding)
    caller = Caller(module, method, output_only, tie_weights=tie_weights, kwargs_names=kwargs or {})
    exported = caller.export(params, args, dict(kwargs or {}), dynamic_shapes, strict=export_strict)
    # Dynamo makes an operator of the call, which is put in line.
    return exported.run_decompositions({}) if export_strict else exported
