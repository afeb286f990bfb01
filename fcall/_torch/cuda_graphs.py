"""The private modules of torch that tell CUDA graphs where to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from fcall._torch import source_of

__all__ = [
    "address_check",
    "are_in_graphs",
    "code_of_this_trace",
    "inductor_setting",
    "mark_static",
]


def inductor_setting(name: str) -> Any:
    """Return what Inductor's ``config`` has under a dotted name."""
    from torch._inductor import config

    return attrgetter(name)(config)


def mark_static(graph: GraphModule, is_static: Callable[[str], bool]) -> None:
    """Have CUDA graphs read some inputs of what Dynamo traced where they are, by their sources.

    ``torch._dynamo.mark_static_address`` is public, and marks tensors; this is what it leads to.
    """
    for node in graph.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        if source is not None and is_static(source_of(source)):
            node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"


def address_check(addresses: Sequence[int]) -> Callable[[list[torch.Tensor]], bool]:
    """Return the check that tensors are at these addresses."""
    expected, numbers = [*addresses], [*range(len(addresses))]
    # In C++, in a torch built for CUDA; no public name.
    compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if compare is None:
        return lambda tensors: [tensor.data_ptr() for tensor in tensors] == expected
    return lambda tensors: compare(tensors, expected, numbers)  # type: ignore[no-any-return]


def are_in_graphs(addresses: Sequence[int]) -> bool:
    """Whether one of these is in memory that the recorded CUDA graphs share."""
    if not torch.cuda.is_available():
        return False
    of_graphs = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment.get("segment_pool_id", (0, 0)) != (0, 0)
    ]
    return any(start <= address < end for address in addresses for start, end in of_graphs)


def code_of_this_trace() -> CodeType:
    """Return the code of the function that Dynamo is tracing, of which others are called."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.root_tx.f_code  # type: ignore[no-any-return]
