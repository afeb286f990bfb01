"""The operators: a class and one instance each, and a rule for each way a call is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fcall import _torch
from fcall.operator import linear
from fcall.placement import Placement

__all__ = ["bind_op", "functional_call_op", "name_placeholders", "place_op"]


class FunctionalCallOp(_torch.HigherOrderOperator):
    """A call of a body with the parameters as operands.

    Equivalent to::

        def functional_call_op(
            body, *operands, names=None, module=None, stores=(), placement=None
        ):
            return body(*operands)

    ``body`` returns any nest of tensors, may mutate operands, and may return operands or views of
    them. The rest is for those who record the call, and not part of the recorded node: ``names``
    has a placeholder's name for each operand, ``module`` is what the body calls, and ``stores`` are
    the dicts that it writes to and restores. With a ``placement``, which has the names of the
    weights, ``names`` are those of the inputs alone.

    It runs its body wherever it is not recorded as a node of a graph: in a transform of torch.func,
    in AOTAutograd, in a backend. So transforms compose, and Inductor fuses across its border.
    """

    def __init__(self) -> None:
        super().__init__("fcall", cacheable=True)

    def __call__(
        self,
        body: Callable[..., Any],
        *operands: Any,
        names: Sequence[str] | None = None,
        module: nn.Module | None = None,
        stores: Sequence[dict[str, Any]] = (),
        placement: Placement | None = None,  # made while Dynamo traces
    ) -> Any:
        if _torch.runs_pre_dispatch(self, operands) and not _torch.in_functorch_transform():
            return super().__call__(body, *operands, names=names)
        return _run(body, operands)


class BindOp(_torch.HigherOrderOperator):
    """The resolving of names, which Dynamo does not trace but does, with a guard on the result.

    Equivalent to::

        def bind_op(bind, *args):
            return bind(*args)
    """

    def __init__(self) -> None:
        super().__init__("fcall_bind")

    def __call__(self, bind: Callable[..., Any], *args: Any) -> Any:
        return bind(*args)


class PlaceOp(_torch.HigherOrderOperator):
    """The resolving of names, and the checking of values, for a body that places them at once.

    Equivalent to::

        def place_op(module, dicts, tie_weights, strict):
            return None, (), ()

    Dynamo returns a placement in place of None, if it can follow, with the names and the values.
    """

    def __init__(self) -> None:
        super().__init__("fcall_place")

    def __call__(self, module: nn.Module, dicts: Any, tie_weights: bool, strict: bool) -> Any:
        return None, (), ()


functional_call_op = FunctionalCallOp()
bind_op = BindOp()
place_op = PlaceOp()


@functional_call_op.py_impl(_torch.ProxyTorchDispatchMode)
def _record(
    mode: Any, body: Callable[..., Any], *operands: Any, names: Sequence[str] | None
) -> Any:
    """Record one node whose body is a graph of its own, in ``make_fx(pre_dispatch=True)``."""
    results = []

    def run(*operands: Any) -> list[Any]:
        # The body runs once, while it is recorded: running it again would mutate buffers twice.
        results.append(_run(body, operands))
        return _graph_outputs(results[-1])

    graph_module = _torch.reenter_make_fx(run)(*operands)
    if names is None:
        assert isinstance(body, GraphModule)  # a call out of a graph that was recorded before
        names = [node.target for node in body.graph.find_nodes(op="placeholder")]
    name_placeholders(graph_module, names)
    root = mode.tracer.root
    root.register_module(mode.tracer.get_fresh_qualname("fcall_body_"), graph_module)
    proxies = _torch.pytree.tree_map(mode.tracer.unwrap_proxy, (graph_module, *operands))
    node = mode.tracer.create_proxy("call_function", functional_call_op, proxies, {})
    out = results[-1]
    _torch.track_tensor_tree(_graph_outputs(out), node, constant=None, tracer=mode.tracer)
    return out


def _run(body: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    if isinstance(body, GraphModule) and _torch.has_preserved_node_meta():
        return linear.run(body, operands)
    return body(*operands)


def _graph_outputs(out: Any) -> list[Any]:
    """Return what of a nest of results a graph can compute; the rest of it is constant."""
    computed = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [leaf for leaf in _torch.pytree.tree_leaves(out) if isinstance(leaf, computed)]


@functional_call_op.py_functionalize_impl
def _functionalize(
    context: Any, body: Callable[..., Any], *operands: Any, names: Sequence[str] | None
) -> Any:
    """Pass on with plain tensors, in the functionalization of a pre-dispatch graph."""
    plain = context.unwrap_tensors(operands)
    with context.redispatch_to_next():
        out = functional_call_op(context.functionalize(body), *plain, names=names)
    return context.wrap_tensors(out)


def name_placeholders(graph_module: GraphModule, names: Sequence[str]) -> None:
    """Name the first placeholders of a graph, making the names unique and valid in it."""
    graph = graph_module.graph
    for node, name in zip(graph.find_nodes(op="placeholder"), names):
        node.name = node.target = graph._graph_namespace.create_name(name, None)
    graph_module.recompile()
