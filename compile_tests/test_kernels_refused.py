"""What fcall.kernels cannot do, and what it needs: named errors, and nothing left behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fcall
from compile_tests.support.needs import need, need_triton
from fcall._torch import triton
from fcall.kernels import cubins, generate, parse

pytestmark = pytest.mark.compiled


def test_the_gpu_is_gone_afterwards() -> None:
    need_triton()
    there = torch.cuda.is_available()
    with triton.absent_gpu():
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.is_available() is there
    with pytest.raises(KeyError), triton.absent_gpu():
        raise KeyError
    assert torch.cuda.is_available() is there


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (
            lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
            "_scaled_dot_product_flash_attention_for_cpu",
        ),
        (lambda x: x + torch.tensor([1.0, 2.0]), "a constant of shape (2,)"),
    ],
)
def test_what_is_otherwise_on_cuda_is_refused(fn: Any, says: str) -> None:
    need_triton()
    with pytest.raises(fcall.errors.NotOnCudaError) as caught:
        generate(fn, torch.ones(1, 1, 4, 2))
    assert says in str(caught.value)


def test_errors_of_the_function_come_through() -> None:
    need_triton()
    with pytest.raises(RuntimeError, match="broadcast"):
        generate(lambda x: x + torch.ones(3), torch.ones(4))


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "says"),
    [
        ("2.13.0", None, "Triton is not installed"),
        ("2.13.0+cpu", "3.6.0", "Triton 3.6.0 is installed; for torch 2.13.0+cpu it is 3.7"),
        ("2.99.0", "3.7.1", "for torch 2.99.0 it is none that is known"),
        ("2.13.0", "3.7.1", "ptxas"),
    ],
)
def test_problems_are_named(
    torch_version: str, triton_version: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if triton_version is None:
            raise triton.metadata.PackageNotFoundError(name)
        return triton_version

    class Knobs:
        class nvidia:
            class ptxas:
                path = "/no/such/ptxas"

    package = type(sys)("triton")
    package.knobs = Knobs
    monkeypatch.setitem(sys.modules, "triton", package)
    monkeypatch.setattr(triton.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    problem = triton.problem.__wrapped__()
    assert says in problem
    monkeypatch.setattr(triton, "problem", lambda: problem)
    for needs in (lambda: generate(torch.relu, torch.ones(1)), lambda: cubins(None)):
        with pytest.raises(fcall.errors.KernelsUnavailableError) as caught:
            needs()
        assert problem in str(caught.value)


def test_what_must_run_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCALL_MUST_RUN", "other,triton")
    need("triton", "")
    with pytest.raises(pytest.fail.Exception, match=r"must run here .*, but: it is not there"):
        need("triton", "it is not there")
    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        need("cuda", "no GPU")
    monkeypatch.delenv("FCALL_MUST_RUN")
    with pytest.raises(pytest.skip.Exception, match="it is not there"):
        need("triton", "it is not there")


MODULE = """
# Topologically Sorted Source Nodes: [y, z], Original ATen: [aten.add, aten.sum]
# Graph fragment:
#   return %z
triton_red_fused_add_sum_0 = async_compile.triton('triton_red_fused_add_sum_0', '''
@triton_heuristics.reduction(
    size_hints={'x': 16})
@triton.jit
def triton_red_fused_add_sum_0(in_ptr0): pass
''', device_str='cuda')

class Runner:
    def call(self, args):
        with torch.cuda._DeviceGuard(0):
            triton_red_fused_add_sum_0.run(buf0, stream=s)
            extern_kernels.mm(buf0, buf1, out=buf2)
            buf3 = torch.ops.aten.sort.default(aten.cumsum(buf0))
            if arg0:
                triton_red_fused_add_sum_0.run(reinterpret_tensor(buf2), stream=s)
            something_else.run()

def get_args():
    triton_red_fused_add_sum_0.run()
"""


def test_what_is_read_of_a_module() -> None:
    graph = parse(MODULE)
    (kernel,) = graph.kernels
    assert (kernel.name, kernel.kind) == ("triton_red_fused_add_sum_0", "reduction")
    assert kernel.operators == ("aten.add", "aten.sum")
    assert kernel.source.startswith("\n@triton_heuristics.reduction(")
    assert graph.launches == (kernel.name, kernel.name)
    assert graph.externs == ("mm", "sort", "cumsum")
