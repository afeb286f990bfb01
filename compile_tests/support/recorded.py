"""CUDA graphs, counted: real ones on a GPU, and without one what stands for them.

On the CPU, what Inductor compiles is "recorded" for the addresses of its static inputs, as torch
does it, and run again for the same ones; other inputs count as copied. What cannot be seen there is
what real graphs do to the memory of outputs: for that, the same tests run on a GPU.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, cudagraph_trees, cudagraph_utils, output_code

from fcall.compiled import weight_sets


@dataclass
class Recordings:
    """What was recorded so far of forwards, in order."""

    static: list[tuple[int, ...]] = field(default_factory=list)
    """For each recording the addresses of its static inputs."""
    copied: list[int] = field(default_factory=list)
    """How many inputs are copied into what was recorded, at each call."""

    def add(self, addresses: tuple[int, ...], others: int) -> None:
        self.static.append(addresses)
        self.copied.append(others)


@contextlib.contextmanager
def recordings(device: str, *, cached: bool = False) -> Iterator[Recordings]:
    """Have what is compiled with CUDA graphs in here be counted; on the CPU, as if on a GPU.

    Args:
        device: Where calls run.
        cached: Whether Inductor may keep what it compiles on disk. Who says so sees to it that it
            finds nothing there that was compiled outside of here.
    """
    found = Recordings()
    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, replacement))

        if device == "cuda":
            patch(cudagraph_trees.CUDAGraphNode, "__init__", _counting_nodes(found))
        else:
            for name in ("cudagraph_post_compile", "cudagraph_partition_post_compile"):
                patch(output_code, name, _standing_in(found))
            patch(cudagraph_utils, "check_multiple_devices_or_any_cpu_nodes", lambda _: None)
            patch(weight_sets, "DEVICES", frozenset({"cpu"}))
            stack.enter_context(config.patch(fx_graph_cache=cached))
        torch.compiler.reset()
        yield found


def _counting_nodes(found: Recordings) -> Callable[..., None]:
    init = cudagraph_trees.CUDAGraphNode.__init__

    def counted(self: Any, function: Any, graph: Any, parent: Any, inputs: Any, *args: Any) -> None:
        static = [i for i in function.static_input_idxs if isinstance(inputs[i], torch.Tensor)]
        addresses, count = tuple([inputs[i].data_ptr() for i in static]), len(inputs)
        init(self, function, graph, parent, inputs, *args)
        if args[4] is not cudagraph_trees.CompilationMode.BACKWARD:
            found.add(addresses, count - len(static))

    return counted


def _standing_in(found: Recordings) -> Callable[..., None]:
    def post_compile(_: Any, compiled: Any, *others: Any) -> None:
        if compiled.fx_kwargs["is_backward"]:
            return
        static = tuple(compiled.fx_kwargs["static_input_idxs"] or ())
        if not {*compiled.mutated_input_idxs} <= {*static}:
            return  # torch records no graph that writes to inputs which it copies
        model = compiled.current_callable
        recorded = set()
        before: dict[int, list[Any]] = defaultdict(list)  # of each thread

        def run(inputs: list[Any]) -> Any:
            addresses = tuple([inputs[i].data_ptr() for i in static])
            if addresses not in recorded:
                recorded.add(addresses)
                found.add(addresses, len(inputs) - len(static))
            given = {i.untyped_storage().data_ptr() for i in inputs if isinstance(i, torch.Tensor)}
            outs = model(inputs)
            if compiled.fx_kwargs["is_inference"]:  # else they may be needed to run it backward
                _overwrite(before[get_ident()])
                before[get_ident()] = [out for out in outs if _memory_of(out) not in given]
            return outs

        compiled.current_callable = run

    return post_compile


def _memory_of(out: Any) -> int | None:
    return out.untyped_storage().data_ptr() if isinstance(out, torch.Tensor) else None


def _overwrite(outs: list[Any]) -> None:
    """Do to the outputs of the call before what the next call does: it has the same memory."""
    for out in outs:
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            out.detach().fill_(torch.nan)
