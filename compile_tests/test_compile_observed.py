"""Fast calls where somebody watches: under a profiler, and below a function that Dynamo compiles.

Else they run what Dynamo compiled without what it puts around that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.compiled import recording
from compile_tests.support.fast import fast_call, route_of
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of
from fcall._torch import compiling

pytestmark = pytest.mark.compiled

MARK = "Pregraph bytecode"
"""What torch calls the part of a profile that is between a call and its graph."""


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def _names_in_profile(call: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_a_profile_shows_the_call() -> None:
    module, x = MLP(), torch.rand(2, 3)
    fn, _ = fast_call(module, state_of(module), x)
    p = state_of(module, seed=1)
    assert MARK in _names_in_profile(lambda: fn(p, x))
    out, route = route_of(fn, p, x)
    assert route.kind == "fast"
    assert_close(out, loaded(module, p)(in_float64(x)))


def test_dynamo_does_not_compile_what_a_fast_call_runs() -> None:
    """Below a graph break Dynamo compiles each Python function that is called."""
    module, x = MLP(), torch.rand(2, 3)
    fn, of_module = fast_call(module, state_of(module), x)
    backend, graphs = recording()

    @torch._dynamo.disable(recursive=False)
    def between(p: dict[str, Tensor], x: Tensor) -> Tensor:
        assert not compiling.compiled_calls().is_unobserved()
        return fn(p, x)

    @torch.compile(backend=backend)
    def outer(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return between(p, x + 1) * 2

    p = state_of(module, seed=1)
    for _ in range(3):
        assert_close(outer(p, x), loaded(module, p)(in_float64(x) + 1) * 2)
    assert len(of_module) == 1
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert not any(getattr(t, "__name__", "") == "linear" for t in targets), "it was traced again"


def test_it_is_unobserved_as_a_rule() -> None:
    assert compiling.compiled_calls().is_unobserved()


class AppendsToAGlobal(nn.Module):
    """``(batch, 2) -> (batch, 2)``: with a side effect that compiled code replays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.shape)
        global COUNT
        COUNT = COUNT + 1
        return self.linear(x)


SEEN: list[Any] = []
COUNT = 0


def test_side_effects_on_globals_are_the_same() -> None:
    SEEN.clear()
    before = COUNT
    module, x = AppendsToAGlobal(), torch.rand(1, 2)
    backend, _ = recording()
    import fcall

    fn = fcall.compile(module, backend=backend)
    for number in range(1, 4):
        p = state_of(module, seed=number)
        assert_close(fn(p, x), loaded(module, p)(in_float64(x)))
    assert len(SEEN) == 6  # the deep copies that are compared with are called, too
    assert before + 6 == COUNT
