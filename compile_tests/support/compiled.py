"""One helper for a compiled call: how many graphs, how many breaks, which route, which results."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fcall
from compile_tests.support.oracle import assert_close, unchanged

traced_or_not = pytest.mark.parametrize(
    "traced",
    [
        pytest.param(False, id="eager"),
        pytest.param(True, id="compiled", marks=pytest.mark.compiled),
    ],
)
"""For tests that call :func:`run`."""


class Compiled(NamedTuple):
    """What a compiled call gave."""

    out: Any
    graphs: list[GraphModule]
    """The graphs that Dynamo captured, in order."""
    routes: list[fcall.Route]
    breaks: int
    """The number of graph breaks."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of the routes, in order."""
        return [route.kind for route in self.routes]


def recording(backend: str = "aot_eager") -> tuple[Callable[..., Any], list[GraphModule]]:
    """Return a backend for ``torch.compile`` and a list that grows by each graph it is given."""
    graphs: list[GraphModule] = []
    inner = torch._dynamo.lookup_backend(backend)

    def record(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(copy.deepcopy(graph))
        return inner(graph, inputs)  # type: ignore[no-any-return]

    return record, graphs


def capture(
    fn: Callable[..., Any],
    *args: Any,
    backend: str = "aot_eager",
    fullgraph: bool = True,
    dynamic: bool | None = None,
) -> Compiled:
    """Compile ``fn`` afresh, call it once with ``args``, and return what happened."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    record, graphs = recording(backend)
    compiled = torch.compile(fn, backend=record, fullgraph=fullgraph, dynamic=dynamic)
    with fcall.record_routes() as routes:
        out = compiled(*args)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Compiled(out, graphs, routes, breaks)


def check_compiled(
    fn: Callable[..., Any],
    *args: Any,
    module: nn.Module | None = None,
    route: str | Sequence[str] = "operator",
    **options: Any,
) -> Compiled:
    """Check that compiled ``fn`` is one graph with the results of eager ``fn``.

    Compared are the outputs; what either call writes into its arguments; and the gradients of the
    arguments, where the outputs have any.

    Args:
        fn: A function of tensors, nested in dicts and the like.
        *args: Its arguments. The eager and the compiled call each get copies.
        module: What both calls must leave unchanged.
        route: The route of the only call in ``fn``, or those of all of them in their order.
        **options: Passed on to :func:`capture`.

    Returns:
        What the compiled call gave.
    """
    eager_args, compiled_args = fresh(args), fresh(args)
    with contextlib.nullcontext() if module is None else unchanged(module):
        expected = fn(*eager_args)
        backward(expected)
        result = capture(fn, *compiled_args, **options)
        backward(result.out)
    assert_close(result.out, expected)
    assert _marks(result.out) == _marks(expected)
    assert_close(compiled_args, eager_args)
    assert_close(gradients(compiled_args), gradients(eager_args))
    assert (len(result.graphs), result.breaks) == (1, 0)
    assert result.kinds == ([route] if isinstance(route, str) else list(route)), result.routes
    return result


def fresh(nest: Any) -> Any:
    """Return ``nest`` with copies of its tensors; what is one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return copies[id(leaf)]

    return pytree.tree_map(copied, nest)


def backward(out: Any) -> None:
    """Run backward from all of ``out`` that has a gradient, each element with another weight."""
    outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    losses = [
        (o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum()
        for o in outputs
        if o.requires_grad and o.grad_fn is not None
    ]
    if losses:
        torch.stack([loss.double() for loss in losses]).sum().backward()


def gradients(nest: Any) -> list[Tensor | None]:
    """Return the gradients of the tensors in ``nest``."""
    leaves = [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]
    return [leaf.grad if leaf.is_leaf else None for leaf in leaves]


def _marks(out: Any) -> list[Any]:
    """Return of each tensor what its values do not tell."""
    leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return [(leaf.dtype, leaf.requires_grad, leaf.is_inference()) for leaf in leaves]


def count_frames(backend: str = "aot_eager") -> tuple[Callable[..., Any], list[int]]:
    """Return a backend for ``torch.compile`` and a list that grows by one for each compilation."""
    compilations: list[int] = []
    inner = torch._dynamo.lookup_backend(backend)

    def counted(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(len(graph.graph.nodes))
        return inner(graph, inputs)  # type: ignore[no-any-return]

    return counted, compilations


def run(traced: bool, fn: Callable[..., Any], *args: Any) -> Any:
    """Call ``fn``, eagerly or as one graph."""
    return capture(fn, *args).out if traced else fn(*args)
