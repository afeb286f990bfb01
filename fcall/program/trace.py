"""``trace``: a module's call as a :class:`Program`, through ``torch.export``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fcall import _torch, errors
from fcall.binding import check_values, first_of_ties
from fcall.given import Weights, merge, refuse_unsupported
from fcall.plan import binding_for
from fcall.program.caller import Caller, output_and_state
from fcall.program.exported import Traced, graph_of, inputs_of, make_attribute, ranges_of
from fcall.program.program import Program
from fcall.program.signature import Input, Signature

__all__ = ["trace"]


def trace(
    module: nn.Module,
    parameter_and_buffer_dicts: Weights,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Mapping[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    tie_weights: bool = True,
    strict: bool = False,
    method: str | None = None,
    bake_rest: bool = False,
) -> Program:
    """Trace a call of ``module`` to a pure graph with one placeholder a name, then the inputs.

    Args:
        module: The module to trace. Not changed, and not needed afterwards.
        parameter_and_buffer_dicts: Example values for parameters and buffers, as for
            :func:`fcall.functional_call`. Their shapes, dtypes and devices count, not their
            numbers: they may be on meta. Not mutated, and not kept. Tied names are one input.
        args: Example positional arguments: a tuple, or a single value that is not a tuple.
            Arguments that are no tensors are constants of the graph.
        kwargs: Example keyword arguments.
        dynamic_shapes: Which dimensions of the inputs vary, as :func:`torch.export.export` takes it
            for the module itself.
        tie_weights: As for :func:`fcall.functional_call`.
        strict: As for :func:`fcall.functional_call`.
        method: The method to trace; ``None`` is the module itself, with its hooks.
        bake_rest: What becomes of parameters and buffers without an example value. ``False`` makes
            them inputs, too, with copies of the module's own as defaults. ``True`` makes the copies
            constants of the graph.

    Returns:
        A callable ``program(parameter_and_buffer_dicts, *args, **kwargs)``.

    Raises:
        BakedStateError: state that is to be a constant is changed by the module
            (a ``RuntimeError``).
        FcallError: those of :func:`fcall.functional_call`.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.export.Dim("batch")
        >>> params = dict(model.named_parameters())
        >>> program = fcall.trace(model, params, torch.ones(4, 3), dynamic_shapes=({0: batch},))
        >>> program.names
        ('weight', 'bias')
        >>> program({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, torch.ones(1, 3))
        tensor([[3., 3.]])
    """
    refuse_unsupported(module, method)
    given = merge(parameter_and_buffer_dicts)
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    binding = binding_for(module, tuple(given), tie_weights=tie_weights, strict=strict)
    check_values(module, given, binding.same, tie_weights=tie_weights)
    weights = first_of_ties(given, binding)
    rest = _copies(module, [slot.name for slot in binding.kept], tie_weights=tie_weights)
    weights |= rest
    caller = Caller(module, method, output_and_state, tie_weights=tie_weights, kwargs_names=kwargs)
    exported = caller.export(weights, args, kwargs, dynamic_shapes)
    exported.example_inputs = None
    out_spec = exported.call_spec.out_spec
    written = _written(exported)
    graph_module = graph_of(exported)
    inputs = inputs_of(graph_module)
    leaves, spec = _torch.pytree.tree_flatten((args, kwargs))
    tied = _tied_names(module, binding.same, tie_weights=tie_weights)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for i, name in enumerate(weights):
        is_reassigned = name in out_spec.child(1).context
        is_written = inputs[i].placeholder in written
        inputs[i] = dataclasses.replace(
            inputs[i],
            name=name,
            kind="buffer" if name in buffers else "parameter",
            tied=tied.get(name, ()),
            changed="reassigned" if is_reassigned else "in place" if is_written else "",
            has_default=name in rest,
        )
    title = type(module).__name__
    if bake_rest:
        inputs, rest = _bake(graph_module, inputs, rest, title), {}
    examples = [*[weights[spec.name] for spec in inputs if spec.is_weight], *leaves]
    signature = Signature(
        title=title,
        inputs=tuple(inputs),
        ranges=ranges_of(exported),
        hints={},
        spec=spec,
        arg_names=caller.arg_names(len(args)),
    )
    signature = dataclasses.replace(signature, hints=signature.sizes(examples))
    return Program(Traced(graph_module, signature, out_spec), rest)


def _copies(module: nn.Module, names: Iterable[str], *, tie_weights: bool) -> dict[str, Tensor]:
    """Return copies of the module's own tensors; of tied ones only the first."""
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    first_names = {id(own[name]): name for name in reversed(list(names))}
    return {
        name: own[name].detach().clone()
        for name in names
        if not tie_weights or first_names[id(own[name])] == name
    }


def _tied_names(
    module: nn.Module, given_ties: Iterable[Sequence[str]], *, tie_weights: bool
) -> dict[str, tuple[str, ...]]:
    """Return for each name the others of the same tensor."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        groups.setdefault(id(tensor) if tie_weights else name, []).append(name)
    found = {name: group for group in groups.values() for name in group}
    for ties in given_ties:
        group = list(dict.fromkeys([*ties, *found.get(ties[0], ())]))
        found.update(dict.fromkeys(group, group))
    return {name: tuple([o for o in group if o != name]) for name, group in found.items()}


def _written(exported: ExportedProgram) -> set[str]:
    """Return the placeholders that are written to in place."""
    # Only functional graphs tell, for some operators, as batch norm, hide that they write.
    signature = exported.run_decompositions({}).graph_signature
    return set(signature.user_inputs_to_mutate.values())


def _bake(
    graph_module: GraphModule, inputs: Sequence[Input], rest: Mapping[str, Tensor], title: str
) -> list[Input]:
    """Make constants of ``rest``, and return the other inputs."""
    changed = [spec.name for spec in inputs if spec.name in rest and spec.changed]
    if changed:
        errors.fail(errors.BakedStateError, title, changed)
    for node, spec in zip(graph_module.graph.find_nodes(op="placeholder"), inputs):
        if spec.name in rest:
            make_attribute(graph_module, node, rest[spec.name])
    graph_module.recompile()
    return [spec for spec in inputs if spec.name not in rest]
