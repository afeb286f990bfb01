"""Graphs made of a graph: in core operators, and with its backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import Node

from fcall import _torch, errors
from fcall._torch import ahead
from fcall.program.exported import Traced, export_traced, traced_again
from fcall.program.signature import Input, Signature

__all__ = ["decomposed", "joint", "moved"]


def decomposed(traced: Traced, table: Mapping[Any, Callable[..., Any]] | None) -> Traced:
    """Return the same in the operators that ``table`` leaves; by default in ATen core."""
    exported = export_traced(traced)
    exported = exported.run_decompositions(None if table is None else dict(table))
    return traced_again(exported, traced)


def moved(traced: Traced, device: torch.device) -> Traced:
    """Return the same on another device, with copies of its constants there."""
    return traced_again(move_to_device_pass(export_traced(traced), device), traced)


def joint(
    traced: Traced,
    loss: Callable[..., Any] | None,
    targets: tuple[Any, ...],
    names: Collection[str] | None,
) -> Traced:
    """Return forward and backward in one graph.

    Its output is the loss, and the gradients by name.

    Args:
        traced: The forward.
        loss: A function of its output and the targets.
        targets: Example tensors; further positional arguments.
        names: Of the weights to differentiate by.
    """
    before = traced.signature
    names = _differentiable(before, names)
    forward = traced._replace(signature=_with_targets(before, targets))

    def loss_of(attached: Collection[str]) -> Callable[..., Any]:
        def finish(
            out: Any, state: Any, weights: dict[str, Tensor], args: tuple[Any, ...]
        ) -> tuple[Tensor, Any]:
            value = out if loss is None else loss(out, *args[len(before.arg_names) :])
            value = _checked(value, before.title)
            # torch's joint graph is for inputs that all have a gradient: here one of zeros.
            value = value + sum(weights[name].flatten()[:0].sum() for name in attached)
            return value, _torch.pytree.tree_map_only(Tensor, Tensor.detach, state)

        return finish

    def exported_with(attached: Collection[str]) -> ExportedProgram:
        finish, extra = loss_of(attached), len(targets)
        exported = export_traced(forward, finish, needs_grad=names, extra=extra)
        return ahead.with_backward(exported) if names else exported.run_decompositions()

    try:
        exported = exported_with(_without_effect(traced, names))
    except AssertionError:  # one has no gradient for a reason that the graph does not tell
        exported = exported_with(names)
    graph_module, signature, _ = traced_again(exported, forward)
    state = traced.out_spec.child(1)
    [output] = graph_module.graph.find_nodes(op="output")
    value, *rest = output.args[0]
    new_state, gradients = rest[: state.num_leaves], rest[state.num_leaves :]
    weights = [spec for spec in before.weights if spec.name in names]
    for spec, gradient in zip(weights, gradients):
        _name(gradient, f"grad_{spec.placeholder}")
    output.args = ((value, *gradients, *new_state),)
    graph_module.recompile()
    by_name = {spec.name: 0 for spec in weights}
    result = (0, by_name), _torch.pytree.tree_unflatten([0] * state.num_leaves, state)
    return Traced(graph_module, signature, _torch.pytree.tree_structure(result))


def _differentiable(signature: Signature, names: Collection[str] | None) -> list[str]:
    """Return ``names`` in order, by default those of all parameters that are real."""
    if names is None:
        return [
            spec.name
            for spec in signature.weights
            if spec.kind == "parameter" and spec.dtype is not None and spec.dtype.is_floating_point
        ]
    if unknown := sorted(set(names) - set(signature.names)):
        known = list(signature.names)
        errors.fail(errors.UnexpectedWeightsError, signature.title, unknown, known)
    return [name for name in signature.names if name in names]


def _with_targets(signature: Signature, targets: tuple[Any, ...]) -> Signature:
    """Return the signature with ``targets`` as further positional arguments."""
    sizes = {number: size for size, number in signature.hints.items()}

    def input_of(target: Tensor, name: str) -> Input:
        shape = tuple([sizes.get(size, size) for size in target.shape])
        stride, dtype, device = target.stride(), target.dtype, target.device
        return Input(name, name, "input", shape, stride, dtype, device)

    leaves = list(signature.inputs[len(signature.names) :])
    args, kwargs = _torch.pytree.tree_unflatten(leaves, signature.spec)
    arg_names = tuple([f"target_{i}" for i in range(len(targets))])
    added = tuple([input_of(target, name) for target, name in zip(targets, arg_names)])
    leaves, spec = _torch.pytree.tree_flatten(((*args, *added), kwargs))
    return dataclasses.replace(
        signature,
        inputs=(*signature.weights, *leaves),
        spec=spec,
        arg_names=(*signature.arg_names, *arg_names),
    )


def _without_effect(traced: Traced, names: Collection[str]) -> list[str]:
    """Return those that no path in the graph leads from to its outputs."""
    nodes = traced.graph_module.graph.find_nodes(op="output")
    seen = set(nodes)
    while nodes:
        new = [node for node in nodes.pop().all_input_nodes if node not in seen]
        nodes += new
        seen.update(new)
    reached = {node.name for node in seen}
    weights = traced.signature.weights
    return [s.name for s in weights if s.name in names and s.placeholder not in reached]


def _checked(value: Any, title: str) -> Tensor:
    if not isinstance(value, Tensor):
        errors.fail(errors.LossError, title, f"a {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        found = f"a tensor of {value.dtype} with the shape {tuple(value.shape)}"
        errors.fail(errors.LossError, title, found)
    return value.reshape(())


def _name(node: Any, name: str) -> None:
    """Name the node of an output, which may be one for several."""
    if isinstance(node, Node) and node.op == "call_function" and not node.name.startswith("grad_"):
        node._rename(name)
