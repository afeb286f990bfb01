"""Inductor without what the checks of a call make needless: assertions, and copies of weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch.fx import GraphModule

from fcall._torch import compiling, cuda_graphs
from fcall.compiled.frames import WEIGHT
from fcall.compiled.record import Record

__all__ = ["LeanInductor"]

CUDA_GRAPHS = "triton.cudagraphs"
"""The option of Inductor that ``mode="reduce-overhead"`` sets."""

OPTION = "size_asserts"
"""The option of Inductor for code that asserts sizes and strides, at 0.2 us an input and call."""


class LeanInductor:
    """A backend for ``torch.compile``: Inductor, with no assertions on the sizes of inputs.

    Whoever calls the compiled graph has compared the inputs with what it was compiled for. The same
    option asserts that other people's operators return what they said they would; so it stays on
    for a graph that has such operators.

    In graphs of the code ``static_in``, CUDA graphs read the weights where they are.
    """

    compiler_name = "inductor"
    resets = 0
    """How often torch was made to forget all compilations, and the memory of CUDA graphs."""

    def __init__(
        self,
        mode: str | None,
        options: Mapping[str, Any] | None,
        dynamic: bool | None,
        record: Record | None = None,
        static_in: CodeType | None = None,
    ) -> None:
        self._record, self._static_in = record, static_in
        self.settings = f"{mode} {sorted((options or {}).items())} {dynamic}"
        """A text that tells these from others."""
        self._full = compiling.inductor(mode, options, dynamic)
        self._lean = compiling.inductor(mode, options, dynamic)
        self._lean.apply_options({OPTION: False})  # type: ignore[attr-defined]

    def __call__(self, graph: GraphModule, inputs: Any) -> Any:
        inductor = self._lean if _is_all_of_torch(graph) else self._full
        # Graphs of other functions, which are called after a graph break, have other weights.
        if self._static_in is not None and self._static_in is cuda_graphs.code_of_this_trace():
            cuda_graphs.mark_static(graph, lambda source: WEIGHT.fullmatch(source) is not None)
        if self._record is not None:
            return self._record.compile(inductor, graph, inputs)
        return inductor(graph, inputs)

    @property
    def records_cuda_graphs(self) -> bool:
        """Whether calls are recorded as CUDA graphs, where they run on a GPU."""
        return bool(self.patches.get(CUDA_GRAPHS, cuda_graphs.inductor_setting(CUDA_GRAPHS)))

    @property
    def compares_addresses(self) -> bool:
        """Whether graphs are recorded anew for static inputs at other addresses: trees of them."""
        name = "triton.cudagraph_trees"
        return bool(self.patches.get(name, cuda_graphs.inductor_setting(name)))

    @property
    def patches(self) -> dict[str, Any]:
        """What differs from Inductor's own settings."""
        return self._lean.config  # type: ignore[attr-defined, no-any-return]

    def reset(self) -> None:
        """Do what torch does for Inductor when it forgets all compilations."""
        LeanInductor.resets += 1
        self._full.reset()  # type: ignore[attr-defined]


def _is_all_of_torch(graph: GraphModule) -> bool:
    parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
    return all(
        _is_of_torch(node.target)
        for part in parts
        for node in part.graph.nodes
        if node.op == "call_function"
    )


def _is_of_torch(target: Any) -> bool:
    """Whether an operator or a function is torch's own, going by where it says it is from."""
    package, *rest = (getattr(target, "__module__", None) or "").split(".")
    if package == "torch" and rest[:1] in (["ops"], ["_ops"]):
        return rest[1:2] in ([], ["aten"], ["prims"], ["prim"], ["higher_order"])
    return package in ("torch", "fcall", "_operator", "math", "builtins", "")
