"""The private modules of torch that tell CUDA graphs where to read, and what is in memory there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule

from fcall._torch import source_of

__all__ = [
    "address_check",
    "copy_all",
    "inductor_setting",
    "mark_static",
    "overlaps_itself",
    "storage_users",
    "with_facts_of_graphs",
    "written_sources",
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


@contextlib.contextmanager
def with_facts_of_graphs() -> Iterator[None]:
    """Have AOTAutograd look at each graph itself, where its cache leaves nothing to be asked for.

    Inductor, which takes most of the time, has a cache of its own.
    """
    from torch._functorch import config

    with config.patch(enable_autograd_cache=False):
        yield


def written_sources(graph: GraphModule) -> list[str] | None:
    """Return the sources of the inputs that a graph writes to in place, once it is compiled.

    None where that cannot be found.
    """
    context = torch._guards.TracingContext.try_get()
    facts = getattr(getattr(context, "fw_metadata", None), "input_info", ())
    inputs = graph.graph.find_nodes(op="placeholder")
    if len(facts) != len(inputs):
        return None
    written = [fact.mutates_data or fact.mutates_metadata for fact in facts]
    return [source_of(node._dynamo_source) for node in compress(inputs, written)]


def address_check(addresses: Sequence[int]) -> Callable[[list[torch.Tensor]], bool]:
    """Return the check that tensors are at these addresses."""
    expected, numbers = [*addresses], [*range(len(addresses))]
    # In C++, in a torch built for CUDA; no public name.
    compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if compare is None:
        return lambda tensors: [tensor.data_ptr() for tensor in tensors] == expected
    return lambda tensors: compare(tensors, expected, numbers)  # type: ignore[no-any-return]


def storage_users(storage: torch.UntypedStorage) -> Callable[[], int]:
    """Return what tells how many tensors, and others, hold a storage. No public name."""
    return functools.partial(torch._C._storage_Use_Count, storage._cdata)


def copy_all(to: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Copy tensors of one dtype, in one kernel on a GPU. No public name."""
    torch._foreach_copy_(to, tensors)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements are known to be one and the same in memory. No public name."""
    return torch._debug_has_internal_overlap(tensor) == 1
