"""CUDA graphs without CUDA: what Inductor compiles for the CPU is "recorded", and counted.

A recording is for the addresses of its static inputs, as torch's are, and is run again for the same.
Other inputs are copied in a real one. What cannot be seen here is what real ones do to the memory of
outputs; tests on a GPU see that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, cudagraph_utils, output_code

from fcall._torch import ahead
from fcall.program import weight_sets


@dataclass
class Recordings:
    """What was recorded, and copied, so far."""

    forward: list[tuple[int, ...]] = field(default_factory=list)
    """The addresses of the static inputs of each recording."""
    backward: list[tuple[int, ...]] = field(default_factory=list)
    copied: int = 0
    """How many inputs were not static, in all calls."""
    weights_copied: int = 0
    """How many weights fcall copied to buffers of its own."""


@contextlib.contextmanager
def recordings() -> Iterator[Recordings]:
    """Have what is compiled with CUDA graphs in here run as if on a GPU."""
    found = Recordings()

    def record(_: Any, compiled: Any, *others: Any) -> None:
        of = found.backward if compiled.fx_kwargs["is_backward"] else found.forward
        static = tuple(compiled.fx_kwargs["static_input_idxs"] or ())
        compiled.current_callable = _recorded(compiled.current_callable, static, found, of)

    copy_all = ahead.copy_all

    def count_copies(to: list[Any], tensors: list[Any]) -> None:
        found.weights_copied += len(to)
        copy_all(to, tensors)

    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(cudagraph_utils, "check_multiple_devices_or_any_cpu_nodes", lambda _: None)
        patch(output_code, "cudagraph_post_compile", record)
        patch(output_code, "cudagraph_partition_post_compile", record)
        patch(weight_sets, "DEVICES", frozenset({"cpu"}))
        patch(ahead, "copy_all", count_copies)
        stack.enter_context(config.patch(fx_graph_cache=False))
        torch.compiler.reset()
        yield found


def _recorded(
    model: Callable[[list[Any]], Any],
    static: Sequence[int],
    found: Recordings,
    recorded: list[tuple[int, ...]],
) -> Callable[[list[Any]], Any]:
    def run(inputs: list[Any]) -> Any:
        addresses = tuple([inputs[i].data_ptr() for i in static])
        if addresses not in recorded:
            recorded.append(addresses)
        found.copied += len(inputs) - len(static)
        return model(inputs)

    return run
