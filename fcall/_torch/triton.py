"""The private parts of torch and Triton with which CUDA code is generated where no GPU is.

Inductor asks the driver for no more than the properties of a device, and Triton for no more than
its architecture, so :func:`absent_gpu` answers for an H200. Autograd cannot be had this way: on a
fake CUDA tensor it aborts a process whose torch was built for the CPU. So :func:`backend` has
AOTAutograd trace fake CPU tensors, and :func:`generate` moves the graphs that it gives.

Tried on the pairs in :data:`PAIRS`, with torch built for the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import subprocess
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = [
    "PAIRS",
    "WITHOUT_FUSION",
    "Built",
    "absent_gpu",
    "backend",
    "build",
    "generate",
    "of_cpu",
    "problem",
]

PAIRS = {"2.13": "3.7"}
"""The version of Triton that each version of torch was made for, of those tried."""

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=150_754_820_096,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=62914560,
    gcnArchName="",
)

# What functions of these names return while the GPU is thought to be there. Each is asked for.
OF_TORCH_CUDA = {
    "is_available": True,
    "get_device_properties": PROPERTIES,
    "get_device_capability": (9, 0),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_device": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
}
OF_DYNAMO = {"current_device": 0, "get_device_properties": PROPERTIES, "is_bf16_supported": True}
OF_DYNAMO_IN_WORKERS = {"get_device_properties": PROPERTIES}
OF_TRITON = {"get_current_device": 0, "get_current_stream": 0}

OPTIONS = {
    "fx_graph_cache": False,  # a graph out of the cache generates no code
    "compile_threads": 1,
    "shape_padding": False,  # decided by timing matmuls
}

WITHOUT_FUSION = {"max_fusion_size": 1}
"""Options with which each reduction is a kernel, and what is pointwise in between."""

Inner = Callable[..., Callable[[list[Any]], Any]]
"""Compiles a graph, called with the graph, its fake inputs, and keywords of Inductor's."""


@functools.cache
def problem() -> str:
    """Return why CUDA code cannot be generated here, or an empty string."""
    try:
        installed = metadata.version("triton")
        from triton import knobs
    except ImportError as error:  # PackageNotFoundError is one
        return f"Triton is not installed ({error})"
    version = ".".join(torch.__version__.split(".")[:2])
    wanted = PAIRS.get(version, "none that is known")
    if ".".join(installed.split(".")[:2]) != wanted:
        return f"Triton {installed} is installed; for torch {torch.__version__} it is {wanted}"
    for tool in ("ptxas", "cuobjdump"):
        try:
            subprocess.run([getattr(knobs.nvidia, tool).path, "--version"], capture_output=True)
        except (AttributeError, OSError, RuntimeError) as error:
            return f"{tool}, which is in Triton's wheels for Linux, does not run ({error})"
    return ""


@contextlib.contextmanager
def absent_gpu() -> Iterator[None]:
    """Have torch, Inductor and Triton see one H200. All threads see it: not for concurrent use."""
    from torch._dynamo import device_interface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from torch.utils import _triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    interface = type("AbsentGpu", (device_interface.CudaInterface,), _static(OF_DYNAMO))
    interface.Worker = type("Worker", (), _static(OF_DYNAMO_IN_WORKERS))  # type: ignore[attr-defined]
    of_triton = {**OF_TRITON, "get_current_target": GPUTarget("cuda", 90, 32)}
    # Without the base's __init__, which loads the CUDA library.
    attributes = {"__init__": _returning(None), **_static(of_triton)}
    absent_driver = type("AbsentDriver", (backends["nvidia"].driver,), attributes)()
    device_interface.get_interface_for_device("cuda")  # the table of interfaces is filled lazily
    with contextlib.ExitStack() as stack:
        on = stack.enter_context
        on(mock.patch.dict(device_interface.device_interfaces, {"cuda": interface}))
        for name, answer in OF_TORCH_CUDA.items():
            on(mock.patch.object(torch.cuda, name, _returning(answer)))
        if hasattr(fake_tensor, "init_gpu_context"):  # which makes a CUDA tensor; gone in 2.13
            on(mock.patch.object(fake_tensor, "init_gpu_context", _returning(None)))
        on(mock.patch.object(driver, "_active", absent_driver))
        # What has been asked before was answered for this machine, and the other way round.
        answered = [f for f in vars(_triton).values() if hasattr(f, "cache_clear")]
        for function in (*answered, DeviceProperties.create):
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _static(answers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: staticmethod(_returning(answer)) for name, answer in answers.items()}


def backend(
    inner: Inner, options: Mapping[str, Any] | None = None
) -> Callable[[GraphModule, Any], Any]:
    """Return a backend for ``torch.compile``: AOTAutograd, Inductor's passes, then ``inner``.

    ``inner`` is called for the forward graph, and for the backward graph if there is one.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    def compile(graph: GraphModule, inputs: Any) -> Any:
        with (
            config.patch({**OPTIONS, **(options or {})}),
            functorch_config.patch(
                enable_autograd_cache=False, force_non_lazy_backward_lowering=True
            ),
        ):
            return compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[arg-type]

    return compile


def of_cpu(graph: GraphModule) -> list[str]:
    """Return what a trace on the CPU put into ``graph`` that is not what it would be on CUDA."""
    found = []
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and re.search(r"_for_cpu\b|\bmkldnn|\bonednn", name):
            found.append(name)
        elif node.op == "get_attr":  # a tensor that the traced code made of numbers
            constant = getattr(graph, node.target, None)
            if isinstance(constant, Tensor) and constant.dim():
                found.append(f"a constant of shape {tuple(constant.shape)}")
    return sorted(set(found))


def generate(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> str:
    """Return the Python module that Inductor generates for ``graph`` on an H200.

    Args:
        graph: What the ``inner`` of :func:`backend` was given. It is left on ``"cuda"``.
        inputs: Fake tensors on the CPU.
        options: Of Inductor.
        **keywords: What else ``inner`` was given.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode

    lookup_seed = torch.ops.prims.inductor_lookup_seed
    sources: list[str] = []

    def keep_source(lowering: Any) -> Any:
        sources.append(lowering.codegen()[0].value)
        return types.SimpleNamespace(call=_returning(None), __file__="", benchmark_harness=None)

    with (
        absent_gpu(),
        torch.no_grad(),
        config.patch({**OPTIONS, **(options or {})}),
        mock.patch.object(GraphLowering, "compile_to_module", keep_source),
        # Takes an element of a fake CUDA tensor, for which torch would need a CUDA build.
        mock.patch.object(lookup_seed.default, "prim_meta_impl", _fake_seed),
    ):
        mode = FakeTensorMode()
        with tracing(TracingContext(mode)):
            moved = [_on_cuda(value, mode) for value in inputs]
            _move(graph, moved, mode)
            compile_fx_inner(graph, moved, **keywords)
    (source,) = sources
    return source


def _fake_seed(seeds: Tensor, index: Any) -> Tensor:
    return seeds.new_empty(())


def _on_cuda(value: Any, mode: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def _move(graph: GraphModule, inputs: Sequence[Any], mode: Any) -> None:
    """Make of a graph that was traced on the CPU what it would be for ``inputs`` on CUDA."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils import _pytree as pytree

    def moved(leaf: Any) -> Any:
        is_cpu = isinstance(leaf, torch.device) and leaf.type == "cpu"
        return torch.device("cuda", 0) if is_cpu else leaf

    for node in graph.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, (node.args, dict(node.kwargs)))
    graph.recompile()
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)


class Built(NamedTuple):
    """One kernel, compiled in one of the configurations that Inductor would try."""

    cubin: bytes
    target: str
    """The architecture that the cubin is for, as in ``sm_90a``."""
    warps: int
    registers: int
    """Registers a thread."""
    stack: int
    """Bytes a thread that registers were spilled to, or that are addressed."""
    local: int
    """Further bytes of local memory a thread."""
    shared: int
    """Bytes of shared memory a block."""


def build(name: str, source: str, folder: Path) -> list[Built]:
    """Compile the kernel ``name`` for an H200, once for each configuration.

    Args:
        name: The kernel's name in ``source``.
        source: The module of this one kernel, which Inductor's module has as a string.
        folder: Where to write files: Triton reads the code of a kernel in one.
    """
    from torch._inductor import config

    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"fcall_kernel_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Not Inductor's own launcher, which keeps no cubin.
    with absent_gpu(), config.patch({**OPTIONS, "use_static_triton_launcher": False}):
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        kernel.precompile(warm_cache_only=True)
    return [_built(result.kernel, folder) for result in kernel.compile_results]


def _built(kernel: Any, folder: Path) -> Built:
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assert target is not None
    return Built(
        cubin=kernel.asm["cubin"],
        target=target[1],
        warps=kernel.metadata.num_warps,
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=kernel.metadata.shared,  # what Triton asks for at the launch
    )
