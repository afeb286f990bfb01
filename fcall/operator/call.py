"""A call of a module as a call of the operator: inputs flattened, a body made, results taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fcall import _torch, routes
from fcall.binding import Binding, bind_for_graph
from fcall.operator.names import argument_names, input_names, placeholder_name
from fcall.operator.register import problem_with_dynamo
from fcall.rnn import needs_plain_rnns, with_plain_rnns
from fcall.substitution import Substituted, Substitution, dicts_of

if not _torch.OPERATOR_PROBLEM:
    from fcall.operator.hop import bind_op, functional_call_op, place_op
    from fcall.placement import Placement, substitute_op

__all__ = ["bind", "call", "call_placed", "is_recorded", "place", "record_inlined"]


def is_recorded() -> bool:
    """Whether ``make_fx(pre_dispatch=True)`` or non-strict export is recording the caller.

    Inside of a transform of torch.func the operator is never recorded, for the transform has to see
    the operations themselves.
    """
    if _torch.OPERATOR_PROBLEM:
        return False
    return _torch.pre_dispatch_proxy_mode() and not _torch.in_functorch_transform()


def bind(
    module: nn.Module, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> tuple[Binding, list[str]]:
    """Do what :func:`fcall.binding.bind_for_graph` does, in a trace."""
    if problem_with_dynamo():
        return bind_for_graph(module, names, tie_weights, strict)
    return bind_op(bind_for_graph, module, names, tie_weights, strict)  # type: ignore[no-any-return]


def place(
    module: nn.Module, dicts: Any, tie_weights: bool, strict: bool
) -> tuple[Placement | None, tuple[str, ...], tuple[Any, ...]]:
    """Return, in a trace, where weights go, their names, and the values, for :func:`call_placed`.

    None and nothing if that cannot be told at once, or is an error: then all is to be traced.
    """
    if problem_with_dynamo():
        return None, (), ()
    return place_op(module, dicts, tie_weights, strict)  # type: ignore[no-any-return]


def call_placed(
    module: nn.Module,
    method: str | None,
    placement: Placement,
    values: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """Do in a trace what :func:`call` does, with weights that are put into place at once.

    Returns:
        What the module returns, and the values that it reassigned, by the given names.
    """
    count = len(values)
    target = module if method is None else getattr(module, method)
    tensors, names, inputs_of = _tensors_in(module, method, args, kwargs)

    def body(*operands: Any) -> tuple[Any, tuple[tuple[str, Any], ...]]:
        args, kwargs = inputs_of(operands[count:])

        def called() -> Any:
            out = target(*args, **kwargs)  # the name that it gets in the graph
            return out

        return substitute_op(placement, called, module, operands[:count])  # type: ignore[no-any-return]

    return functional_call_op(  # type: ignore[no-any-return]
        body, *values, *tensors, names=names, module=module, placement=placement
    )


def _tensors_in(
    module: nn.Module, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], tuple[str, ...], Callable[[Sequence[Any]], tuple[Any, Any]]]:
    """Return the tensors among the inputs, their names, and what makes inputs of others."""
    if not kwargs and all(isinstance(arg, torch.Tensor) for arg in args):  # quick to trace
        names = argument_names(type(module), method or "forward", len(args))
        return args, names, lambda tensors: (tensors, {})
    leaves, spec = _torch.pytree.tree_flatten((args, kwargs))
    numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    names_of_all = input_names(module, method, args, kwargs)

    def inputs_of(tensors: Sequence[Any]) -> tuple[Any, Any]:
        inputs = list(leaves)
        for i, tensor in zip(numbers, tensors):
            inputs[i] = tensor
        return _torch.pytree.tree_unflatten(inputs, spec)  # type: ignore[no-any-return]

    return [leaves[i] for i in numbers], tuple([names_of_all[i] for i in numbers]), inputs_of


def call(
    module: nn.Module,
    method: str | None,
    substitution: Substitution,
    names: tuple[str, ...],
    values: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[int, Any]]:
    """Call ``module`` through the operator.

    The operands are ``values`` in the order of ``names``, then the tensors among the inputs, in the
    order in which they stand in ``args`` and ``kwargs``. All else in the inputs is constant.

    Args:
        module: The module whose state is substituted.
        method: Its method to call; ``None`` for the module itself.
        substitution: Where the values go.
        names: The given names.
        values: A value for each of ``names``.
        args: Positional arguments, nested as they come.
        kwargs: Keyword arguments.

    Returns:
        What the module returns, and the values that it reassigned, by position in ``values``.
    """
    given_count = len(values)
    class_name = type(module).__name__
    if not torch.compiler.is_dynamo_compiling():
        routes.record(class_name, routes.OPERATOR)
        names, values, substitution = _with_kept(names, values, substitution)
    target = module if method is None else getattr(module, method)
    tensors, names_of_inputs, inputs_of = _tensors_in(module, method, args, kwargs)

    def body(*operands: Any) -> tuple[Any, dict[int, Any]]:
        args, kwargs = inputs_of(operands[len(values) :])
        substituted = Substituted(substitution, operands[: len(values)])
        with substituted:
            out = target(*args, **kwargs)
        return out, substituted.changed

    operands = (*values, *tensors)
    if torch.compiler.is_dynamo_compiling() and problem_with_dynamo():
        record_inlined(class_name, problem_with_dynamo())
        return body(*operands)
    own = [store.get(key, None) for _, (store, key) in substitution.kept]
    run: Callable[..., Any] = functional_call_op
    if needs_plain_rnns(substitution.rnns, (*operands, *own)):
        run = with_plain_rnns(run)
    out, changed = run(
        body,
        *operands,
        names=(*[placeholder_name(name) for name in names], *names_of_inputs),
        module=module,
        stores=dicts_of(substitution),
    )
    for number in [number for number in changed if number >= given_count]:
        store, key = substitution.entries[substitution.layout.homes[number]]
        store[key] = changed.pop(number)  # the module reassigned its own
    return out, changed


def _with_kept(
    names: tuple[str, ...], values: tuple[Any, ...], substitution: Substitution
) -> tuple[tuple[str, ...], tuple[Any, ...], Substitution]:
    """Give the module its own tensors, too, where it was given no others.

    Dynamo makes operands of whatever a body uses; make_fx makes constants of what is no operand.
    """
    layout = substitution.layout
    names = (*names, *[name for name, _ in layout.kept])
    kept = [entry for _, entry in substitution.kept]
    own = [store.get(key, None) for store, key in kept]
    count = len(layout.places)
    layout = layout._replace(
        places=[*layout.places, *[place for _, place in layout.kept]],
        keys=[*layout.keys, *[key for _, key in kept]],
        sources=[*layout.sources, *range(len(values), len(values) + len(own))],
        homes=[*layout.homes, *range(count, count + len(own))],
        kept=[],
    )
    stores = [*substitution.stores, *[store for store, _ in kept]]
    substitution = substitution._replace(layout=layout, stores=stores)
    return names, (*values, *own), substitution


@_torch.evaluated_while_tracing
def record_inlined(class_name: str, reason: str) -> None:
    """Record, while tracing, a call that is traced into the caller's graph."""
    routes.record(class_name, routes.INLINED, reason)
