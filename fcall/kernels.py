"""What Inductor makes of a function on an H200: kernels, launches, calls of libraries, cubins.

Nothing is run, and no GPU is needed: the code is generated from tensors that hold no memory, and
compiled by the ptxas that Triton brings along. It cannot be said what is fast, nor what is chosen
by timing: CUDA graphs, autotuned matmuls.
"""

from __future__ import annotations

import ast
import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fcall import errors
from fcall._torch import triton
from fcall._torch.triton import Built

__all__ = ["Built", "Generated", "Graph", "Kernel", "cubins", "generate", "parse", "source_of"]


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel."""

    name: str
    """As in ``triton_poi_fused_add_gelu_0``."""
    kind: str
    """How it is scheduled: ``pointwise``, ``reduction``, ``persistent_reduction``, ..."""
    operators: tuple[str, ...]
    """What is fused in it, as in ``("aten.add", "aten.gelu")``."""
    source: str
    """A Python module with the kernel as a function."""


@dataclass(frozen=True)
class Graph:
    """What was generated for one graph: a forward, or a backward."""

    source: str
    """The Python module that Inductor generated."""
    kernels: tuple[Kernel, ...]
    launches: tuple[str, ...]
    """The names of the kernels in the order in which a run launches them."""
    externs: tuple[str, ...]
    """The calls of libraries, as in ``addmm``, in order."""


@dataclass(frozen=True)
class Generated:
    """What was generated for a function: its graphs, and what they are together."""

    graphs: tuple[Graph, ...]
    """The forward; then the backward, where an argument needs a gradient."""

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of all graphs."""
        return tuple(kernel for graph in self.graphs for kernel in graph.kernels)

    @property
    def launches(self) -> tuple[str, ...]:
        """The launches of all graphs."""
        return tuple(name for graph in self.graphs for name in graph.launches)

    @property
    def externs(self) -> tuple[str, ...]:
        """The calls of libraries of all graphs."""
        return tuple(name for graph in self.graphs for name in graph.externs)


def generate(
    fn: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None
) -> Generated:
    """Return what ``torch.compile`` would generate for ``fn(*args)`` on an H200.

    While it is at work, all of the process sees a GPU that is not there. So no other thread may use
    torch meanwhile.

    Args:
        fn: A function, a module or a :class:`fcall.Program`; it has to be one graph for Dynamo.
        *args: Its arguments: nests of tensors on the CPU. No values are looked at, so they may be
            fake. Where one needs a gradient, the backward is generated, too.
        options: Settings of Inductor, as ``torch.compile`` takes.

    Raises:
        KernelsUnavailableError: Triton is not here, or not the one made for this torch.
        NotOnCudaError: the graph has something that is otherwise on CUDA.
    """
    _require_triton()
    captured: list[tuple[GraphModule, Sequence[Any], dict[str, Any]]] = []

    def keep(graph: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
        captured.append((graph, inputs, keywords))
        return _stop

    compile = triton.backend(keep, options)

    def backend(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        compile(graph, inputs)
        return _stop

    def call(*args: Any) -> Any:
        return fn(*args)

    # Dynamo counts compilations by code: this one has a code of its own.
    call.__code__ = call.__code__.replace(co_name="generate")
    with contextlib.suppress(_StoppedError):
        torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*args)
    return Generated(tuple(parse(source_of(*graph, options)) for graph in captured))


class _StoppedError(Exception):
    """The graph was captured, and is not to be run."""


def _stop(*args: Any) -> Any:
    raise _StoppedError


def source_of(
    graph: GraphModule,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the module generated for one graph that Inductor was given, with its fake inputs.

    Raises:
        NotOnCudaError: the graph has something that is otherwise on CUDA.
    """
    if found := triton.of_cpu(graph):
        raise errors.NotOnCudaError(found)
    return triton.generate(graph, inputs, options, **keywords)


def parse(source: str) -> Graph:
    """Return what is in a module that Inductor generated."""
    tree = ast.parse(source)
    kernels = [
        _kernel(source, node.lineno, *map(ast.literal_eval, node.value.args[:2]))
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "async_compile.triton"
    ]
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    called = [ast.unparse(node.func) for node in _in_order(call) if isinstance(node, ast.Call)]
    names = {kernel.name for kernel in kernels}
    runs = [name.removesuffix(".run") for name in called if name.endswith(".run")]
    return Graph(
        source=source,
        kernels=tuple(kernels),
        launches=tuple(name for name in runs if name in names),
        externs=tuple(match[1] for name in called if (match := _EXTERN.fullmatch(name))),
    )


_EXTERN = re.compile(r"(?:extern_kernels|torch\.ops\.aten|aten)\.(\w+)(?:\.\w+)?")


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below ``node`` in the order of the text."""
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _in_order(child)


def _kernel(module: str, line: int, name: str, source: str) -> Kernel:
    """Return the kernel that ``module`` defines in ``line``, below comments on its origin."""
    above = module.splitlines()[: line - 1]
    origin = next(comment for comment in reversed(above) if "Original ATen: [" in comment)
    kind = re.search(r"^@triton_heuristics\.(\w+)\(", source, re.MULTILINE)
    assert kind is not None, source
    operators = origin.partition("Original ATen: [")[2].rstrip("]")
    return Kernel(name, kind[1], tuple(operators.split(", ")), source)


def cubins(kernel: Kernel) -> tuple[Built, ...]:
    """Return what ptxas makes of ``kernel`` for sm_90, one for each configuration it may run in.

    It takes 0.1 to 0.3 seconds each.

    Raises:
        KernelsUnavailableError: Triton is not here, or not the one made for this torch.
    """
    _require_triton()
    with tempfile.TemporaryDirectory() as folder:
        return tuple(triton.build(kernel.name, kernel.source, Path(folder)))


def _require_triton() -> None:
    if problem := triton.problem():
        raise errors.KernelsUnavailableError(problem)
