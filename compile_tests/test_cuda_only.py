"""What only a GPU has: streams, CUDA graphs, a second device, an allocator of its own."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import backward, fresh, gradients
from compile_tests.support.devices import calling, example, inductor, on, only_cuda, values_of
from compile_tests.support.models import EXAMPLES
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from compile_tests.support.threads import run


@only_cuda
@pytest.mark.parametrize("kind", ["eager", "compiled callable"])
def test_streams(device: str, kind: str) -> None:
    """A call runs on the stream of its caller, in backward, too; threads have one each."""
    module, x = example("Attention", device)
    call = calling(module) if kind == "eager" else fcall.compile(module)

    def result(seed: int) -> tuple[Tensor, list[Tensor | None]]:
        p = values_of(module, seed, learned=True)
        out = call(p, x)
        backward(out)
        return out.detach(), gradients(p)

    expected = [result(seed) for seed in range(4)]
    torch.cuda.synchronize()

    def in_a_stream(seed: int) -> tuple[Tensor, list[Tensor | None]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # what runs on another stream is done before this
            found = result(seed)
        stream.synchronize()
        return found

    for seed in range(4):
        assert_close(in_a_stream(seed), expected[seed])
    found = run(*[lambda seed=seed: in_a_stream(seed) for seed in range(4)])
    assert_close(found, expected)


@only_cuda
def test_a_cuda_graph_of_an_eager_call(device: str) -> None:
    """A call waits for nothing, so it can be recorded, and replayed with other values."""
    module, x = example("Attention", device)
    p = values_of(module, 1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # libraries are loaded before anything is recorded
        fcall.functional_call(module, p, x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fcall.functional_call(module, p, x)
    for seed in (2, 3):
        other = values_of(module, seed)
        for name, value in p.items():
            value.copy_(other[name])
        graph.replay()
        assert_close(out, fcall.functional_call(module, other, x))


@only_cuda
@pytest.mark.compiled
@pytest.mark.inductor
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["compiled", "compiled callable"])
def test_cuda_graphs_of_a_compiled_call(device: str, kind: str, learned: bool) -> None:
    """``mode="reduce-overhead"``: weights are inputs of what is replayed."""
    module, x = example("Attention", device)
    if kind == "compiled":
        fn = inductor(calling(module), mode="reduce-overhead")
    else:
        fn = fcall.compile(module, mode="reduce-overhead")  # more in test_weight_sets.py
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2, 3, 1, 4):
        torch.compiler.cudagraph_mark_step_begin()
        given = values_of(module, seed, learned=learned)
        same = fresh(given)
        out = fn(given, x)
        backward(out)
        expected = fcall.functional_call(module, same, x)
        backward(expected)
        assert_close(out, expected)
        assert_close(gradients(given), gradients(same))
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["cudagraph_skips"] == 0
    copied = counters["cudagraph_recorded_non_static_inputs"]
    assert copied > (len(given) if kind == "compiled" else 0), "weights, and the input"


@only_cuda
@pytest.mark.parametrize("traced", [False, True])
def test_weights_on_another_device(device: str, traced: bool) -> None:
    module, x = example("MLP", device)
    p = {**values_of(module, 1), "l1.weight": torch.rand(4, 3)}
    call = calling(module)
    fn = torch.compile(call, fullgraph=True, backend="eager") if traced else call
    with unchanged(module), pytest.raises(RuntimeError) as caught:
        fn(p, x)
    assert re.search(r"same device|different devices", str(caught.value))
    if not traced and hasattr(caught.value, "add_note"):
        assert "on cpu 'l1.weight'; on cuda:0 'l1.bias'" in caught.value.__notes__[0]
    p["l1.weight"] = p["l1.weight"].to(device)
    assert_close(fn(p, x), loaded(module, p)(in_float64(x)), dtype=torch.float32)


@only_cuda
@pytest.mark.compiled
@pytest.mark.inductor
def test_the_compiled_callable_on_two_devices(device: str) -> None:
    """What was compiled for one device is not used on the other."""
    module, x = EXAMPLES["MLP"]()
    fn = fcall.compile(module)
    for place in ("cpu", device, "cpu", device):
        p = {name: value.to(place) for name, value in state_of(module, seed=1).items()}
        out = fn(p, x.to(place))
        on(place, out)
        assert_close(out.cpu(), loaded(module, p)(in_float64(x)), dtype=torch.float32)


@only_cuda
@pytest.mark.compiled
@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["eager", "compiled", "compiled callable"])
def test_too_little_memory_on_the_gpu(device: str, kind: str) -> None:
    """A call that the GPU's allocator ends, in compiled code, too; the next one is right."""
    module = nn.Sequential(nn.Linear(64, 2**20), nn.Tanh()).to(device)
    x = torch.rand(64, 64, device=device)
    p = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    call = {
        "eager": calling(module),
        "compiled": inductor(calling(module)),
        "compiled callable": fcall.compile(module),
    }[kind]
    with torch.no_grad():
        expected = call(p, x).cpu()  # of 256 MiB
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        _, total = torch.cuda.mem_get_info()
        try:
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
            with unchanged_on_a_gpu(module), pytest.raises(torch.cuda.OutOfMemoryError):
                call(p, x)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        assert torch.cuda.memory_allocated() == held, "something of the call is kept"
        assert call(p, x).cpu().equal(expected)


@contextlib.contextmanager
def unchanged_on_a_gpu(module: nn.Module) -> Iterator[None]:
    """Check that parameters are the same tensors, unwritten, without a copy of their values."""
    before = [(name, id(p), p._version) for name, p in module.named_parameters()]
    yield
    assert [(name, id(p), p._version) for name, p in module.named_parameters()] == before
