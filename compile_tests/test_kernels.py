"""Inductor fuses across the operator's border: the kernels are those of the plain module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code

import fcall
from compile_tests.support.compiled import backward, gradients
from compile_tests.support.models import EXAMPLES
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = [pytest.mark.compiled, pytest.mark.inductor]


class Kernels(NamedTuple):
    """What Inductor made of a forward and its backward."""

    loops: int
    """C++ loop nests, before some of them are put into one kernel."""
    fused: list[int]
    """The number of calls of generated kernels, for each graph."""
    extern: list[Counter[str]]
    """The calls of the libraries' kernels, for each graph."""


def kernels_of(fn: Callable[..., Any], *args: Any) -> tuple[Any, Kernels]:
    """Compile ``fn``, run it forward and backward, and return its result and its kernels."""

    def run() -> Any:
        out = torch.compile(fn, fullgraph=True)(*args)
        backward(out)
        return out

    torch._dynamo.reset()
    metrics.reset()
    # A graph out of a cache generates no code. C++ that was built before may be used.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        out, codes = run_and_get_code(run)
    calls = [code.partition("def call(")[2] for code in codes]
    return out, Kernels(
        loops=metrics.generated_kernel_count,
        fused=[len(re.findall(r"\bcpp_fused_\w+\(", code)) for code in calls],
        extern=[Counter(re.findall(r"extern_kernels\.(\w+)\(", code)) for code in calls],
    )


@pytest.mark.parametrize("name", ["MLP", "Attention", "Normed in eval"])
def test_as_many_kernels_as_the_plain_module(name: str) -> None:
    module, x = EXAMPLES[name]()
    p = {
        n: v.requires_grad_(n in dict(module.named_parameters()))
        for n, v in state_of(module).items()
    }
    _, plain = kernels_of(module, x)
    with unchanged(module):
        out, ours = kernels_of(lambda p, x: fcall.functional_call(module, p, x), p, x)
    assert len(ours.fused) == 2, "a forward graph and a backward graph"
    assert ours.loops == plain.loops > 0
    assert ours.extern == plain.extern
    # What is fused depends a little on the order of a graph's inputs. It may only be more.
    assert all(0 < mine <= theirs for mine, theirs in zip(ours.fused, plain.fused))

    twin = loaded(module, p)
    expected = twin(in_float64(x))
    backward(expected)
    assert_close(out, expected)
    given = [p[n] for n, _ in module.named_parameters()]
    assert_close(gradients(given), gradients(list(twin.parameters())), dtype=torch.float32)


def test_kernels_of_a_gradient_by_torch_func() -> None:
    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return fcall.functional_call(module, p, x).square().mean()

    def by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, p["l1.weight"], p["l1.bias"]).tanh()
        return nn.functional.linear(hidden, p["l2.weight"], p["l2.bias"]).square().mean()

    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    out, ours = kernels_of(torch.func.grad(loss), p, x)
    expected, theirs = kernels_of(torch.func.grad(by_hand), p, x)
    assert_close(out, expected)
    assert ours == theirs


def test_the_compiled_callable() -> None:
    module, x = EXAMPLES["MLP"]()
    fn = fcall.compile(module, method="encode")
    for seed in range(2):
        p = state_of(module, seed=seed)
        assert_close(fn(p, x), loaded(module, p).encode(in_float64(x)), dtype=torch.float32)


def test_graphs_are_found_in_the_caches() -> None:
    module, x = EXAMPLES["MLP"]()
    counters = torch._dynamo.utils.counters
    with fresh_cache():
        for hits in (0, 1):
            torch._dynamo.reset()
            counters.clear()
            p = {n: v.requires_grad_() for n, v in state_of(module, seed=hits).items()}
            out = torch.compile(lambda p, x: fcall.functional_call(module, p, x))(p, x)
            backward(out)
            assert_close(out, loaded(module, p)(in_float64(x)))
            assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        # Another body with the same operands is another graph.
        torch._dynamo.reset()
        out = torch.compile(lambda p, x: fcall.functional_call(module, p, x, {"scale": 3.0}))(p, x)
        assert_close(out, loaded(module, p)(in_float64(x), scale=3.0))
