"""A backend that runs the CUDA code Inductor generates: on the CPU, in Triton's interpreter.

For a process of its own, started with ``TRITON_INTERPRET=1``: Triton asks for that as it is
imported, and what is patched here stays patched. Each kernel runs in the first of its
configurations; matmuls are torch's own. What cannot be run: random numbers, attention kernels, CUDA
graphs, matmuls as templates.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from torch.fx import GraphModule
from triton import knobs
from triton.runtime.interpreter import TensorHandle

from fcall._torch import triton
from fcall.kernels import source_of

assert knobs.runtime.interpret, "TRITON_INTERPRET=1 has to be set before Python starts"

OTHER_NAMES = {"llrint": "round"}
"""The functions of libdevice that torch has under another name."""

_numbers = itertools.count()
_folder = tempfile.TemporaryDirectory()  # Triton reads the code of kernels in files


class Libdevice:
    """CUDA's library of functions, which the interpreter lacks, by functions of torch."""

    def __getattr__(self, name: str) -> Callable[..., tl.tensor]:
        fn = getattr(torch, OTHER_NAMES.get(name, name))

        def call(*args: Any) -> tl.tensor:
            like = next(arg for arg in args if isinstance(arg, tl.tensor))
            values = [arg.handle.data if isinstance(arg, tl.tensor) else arg for arg in args]
            out = fn(*map(torch.as_tensor, values)).numpy()
            kind = tl.int1 if out.dtype == np.bool_ else like.dtype
            of = like.type.with_element_ty(kind) if like.type.is_block() else kind
            return tl.tensor(TensorHandle(out, kind), of)

        return call


def interpreting(
    edit: Callable[[str], str] = str,
) -> tuple[Callable[[GraphModule, Any], Any], list[str]]:
    """Return a backend for ``torch.compile`` and a list that grows by each module generated.

    Args:
        edit: Changes what was generated before it is run.
    """
    sources: list[str] = []

    def inner(graph: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
        source = source_of(graph, inputs, keywords)
        sources.append(source)
        return _load(edit(source))

    return triton.backend(inner), sources


def _load(source: str) -> Callable[[list[Any]], Any]:
    """Return what a generated module runs, for CPU tensors."""
    name = f"generated_{next(_numbers)}"
    path = Path(_folder.name) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with triton.absent_gpu():
        spec.loader.exec_module(module)

    def call(args: list[Any]) -> Any:
        plain = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        args.clear()
        with triton.absent_gpu():
            return module.call(plain)

    call._boxed_call = True
    return call


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    # Not empty: what no kernel writes must not be right by chance.
    filling = float("nan") if dtype.is_floating_point else 77
    return torch.empty_strided(size, stride, dtype=dtype).fill_(filling)


# What generated modules take from a torch that was built for CUDA.
triton_helpers.libdevice = Libdevice()
torch._C._dynamo.guards._empty_strided_cuda = _empty_strided
torch._C._cuda_getCurrentRawStream = lambda device: 0
