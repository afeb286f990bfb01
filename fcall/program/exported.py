"""Between flat graphs and ``torch.export``: the graph of an ExportedProgram, and the way back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from fcall import _torch
from fcall._torch import ahead
from fcall.program.caller import unused_name
from fcall.program.signature import Input, Signature, Size, evaluate

__all__ = [
    "Traced",
    "export_traced",
    "graph_of",
    "inputs_of",
    "make_attribute",
    "ranges_of",
    "traced_again",
]


class Traced(NamedTuple):
    """A graph, and what is to be known to call it."""

    graph_module: GraphModule
    """It takes flat inputs in the order of :attr:`Signature.inputs`, and returns flat outputs."""
    signature: Signature
    out_spec: Any
    """The ``TreeSpec`` of ``(output, state)``, where ``state`` is what was reassigned, by name."""


def graph_of(exported: ExportedProgram) -> GraphModule:
    """Return a graph that takes all user inputs flat, in order, and returns the user outputs flat.

    Constants are attributes of it. What ``exported`` returns for the sake of inputs that it changes
    is copied into these; gradients come last.

    Args:
        exported: The program. Not to be used any more.
    """
    signature = exported.graph_signature
    graph_module = GraphModule(exported.graph_module, exported.graph, class_name="Program")
    graph = graph_module.graph
    inputs = {}
    for node, spec in zip(graph.find_nodes(op="placeholder"), signature.input_specs):
        if spec.kind == InputKind.USER_INPUT:
            inputs[node.name] = node
        else:
            make_attribute(graph_module, node, exported.constants[spec.target])
    [output] = graph.find_nodes(op="output")
    returned: list[Any] = []
    gradients: list[Any] = []
    for value, spec in zip(output.args[0], signature.output_specs):
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            with graph.inserting_before(output):
                graph.call_function(torch.ops.aten.copy_.default, (inputs[spec.target], value))
        elif spec.kind == OutputKind.GRADIENT_TO_USER_INPUT:
            gradients.append(value)
        else:
            returned.append(value)
    output.args = ((*returned, *gradients),)
    graph_module.recompile()
    return graph_module


def make_attribute(graph_module: GraphModule, node: Node, value: Any) -> None:
    """Turn a placeholder into an attribute, with a copy of ``value``."""
    name = node.name
    if isinstance(value, Tensor):
        graph_module.register_buffer(name, value.detach().clone())
    else:
        setattr(graph_module, name, value)
    with graph_module.graph.inserting_before(node):
        attribute = graph_module.graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph_module.graph.erase_node(node)


def inputs_of(graph_module: GraphModule) -> list[Input]:
    """Return what each placeholder takes."""
    return [_input_of(node) for node in graph_module.graph.find_nodes(op="placeholder")]


def _input_of(node: Node) -> Input:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return Input(node.name, node.name, "constant", value=value)
    return Input(
        node.name,
        node.name,
        "input",
        shape=tuple([_size(size) for size in value.shape]),
        stride=tuple([_size(step) for step in value.stride()]),
        dtype=value.dtype,
        device=value.device,
    )


def _size(size: Any) -> Size:
    return size if isinstance(size, int) else str(size)


def ranges_of(exported: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the limits of each dynamic size, None for no upper one."""
    limits = {str(s): (int(r.lower), str(r.upper)) for s, r in exported.range_constraints.items()}
    return {s: (low, int(high) if high.isdigit() else None) for s, (low, high) in limits.items()}


def export_traced(
    traced: Traced,
    finish: Callable[..., Any] = lambda out, state, *_: (out, state),
    *,
    needs_grad: Collection[str] = (),
    extra: int = 0,
) -> ExportedProgram:
    """Return an exported program of a graph, with nothing but user inputs.

    Its example inputs hold no memory.

    Args:
        traced: The graph.
        finish: What makes the result of ``(out, state, weights, args)``.
        needs_grad: The names of weights that need gradients.
        extra: How many of the last positional arguments are for ``finish`` alone.
    """
    graph_module, signature, out_spec = traced
    count = len(signature.names)
    flat = _examples(signature, needs_grad)
    weights = dict(zip(signature.names, flat[:count]))
    args, kwargs = _torch.pytree.tree_unflatten(flat[count:], signature.spec)

    def forward(weights: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        own = args[: len(args) - extra]
        flat = (*weights.values(), *_torch.pytree.tree_leaves((own, kwargs)))
        out, state = _torch.pytree.tree_unflatten(graph_module(*flat), out_spec)
        return finish(out, state, weights, args)

    names = [unused_name({*signature.arg_names, *kwargs}), *signature.arg_names]
    by_position, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *[inspect.Parameter(name, by_position) for name in names],
            *[inspect.Parameter(name, by_name) for name in kwargs],
        ]
    )
    caller = nn.Module()
    caller.forward = forward
    sizes = [_dynamic_sizes(spec, signature) for spec in signature.inputs]
    of_args, of_kwargs = _torch.pytree.tree_unflatten(sizes[count:], signature.spec)
    dynamic_shapes = {**dict(zip(names, (dict(zip(weights, sizes)), *of_args))), **of_kwargs}
    return torch.export.export(
        caller, (weights, *args), kwargs, dynamic_shapes=dynamic_shapes, strict=False
    )


def traced_again(exported: ExportedProgram, traced: Traced) -> Traced:
    """Return the graph of what was made of :func:`export_traced` of ``traced``.

    With the names that there were before, but for those of dynamic sizes.
    """
    before = traced.signature
    graph_module = graph_of(exported)
    found = inputs_of(graph_module)
    hints: dict[str, int] = {}
    for old, new in zip(before.inputs, found):
        for size, same in zip(old.shape, new.shape):
            if isinstance(same, str) and same.isidentifier():
                hints[same] = evaluate(size, before.hints)
    inputs = [
        dataclasses.replace(old, shape=new.shape, stride=new.stride, device=new.device)
        for old, new in zip(before.inputs, found)
    ]
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), before.placeholders):
        _rename(graph_module.graph, node, name)
    graph_module.recompile()
    signature = dataclasses.replace(
        before, inputs=tuple(inputs), ranges=ranges_of(exported), hints=hints
    )
    return Traced(graph_module, signature, traced.out_spec)


def _examples(signature: Signature, needs_grad: Collection[str]) -> list[Any]:
    """Return inputs without memory."""
    examples = []
    with ahead.fake_mode():
        for spec in signature.inputs:
            if spec.kind == "constant":
                examples.append(spec.value)
                continue
            shape, stride = (
                [evaluate(size, signature.hints) for size in sizes]
                for sizes in (spec.shape, spec.stride)
            )
            example = torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)
            examples.append(example.requires_grad_(spec.name in needs_grad))
    return examples


def _dynamic_sizes(spec: Input, signature: Signature) -> dict[int, Any] | None:
    """Return which sizes of an input are dynamic, as ``torch.export`` takes it."""
    sizes: dict[int, Any] = {}
    for i, size in enumerate(spec.shape):
        if isinstance(size, str):
            low, high = signature.ranges.get(size, (None, None))
            sizes[i] = Dim.AUTO(min=low, max=high)
    return sizes or None


def _rename(graph: Graph, node: Node, name: str) -> None:
    if node.name == name:
        return
    for other in graph.nodes:
        if other.name == name:
            other._rename(f"{name}_")
    node._rename(name)
    node.target = name
