"""When a compiled call is compiled again: where something changed that its graph depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch.nn.utils import parametrize

import fcall
from compile_tests.support.compiled import capture, recording
from compile_tests.support.models import EXAMPLES, MLP, Counter, Symmetric
from compile_tests.support.oracle import assert_close, state_of

pytestmark = pytest.mark.compiled

call = fcall.functional_call


def compiled_call(module: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Return a compiled call of ``module``, and the list of its graphs."""
    torch._dynamo.reset()
    backend, graphs = recording()
    fn = torch.compile(lambda p, x: call(module, p, x), fullgraph=True, backend=backend, **options)
    return fn, graphs


@pytest.mark.parametrize(("dynamic", "compilations"), [(None, 2), (True, 1)])
def test_batch_sizes_end_in_one_dynamic_graph(dynamic: bool | None, compilations: int) -> None:
    module, _ = EXAMPLES["MLP"]()
    fn, graphs = compiled_call(module, dynamic=dynamic)
    p = state_of(module, seed=1)
    for batch in (5, 2, 3, 9):  # 5 first: Dynamo takes equal sizes of a first call for one
        x = torch.rand(batch, 3)
        assert_close(fn(p, x), call(module, p, x))
    assert len(graphs) == compilations


@pytest.mark.parametrize("name", ["Attention", "Normed", "Tied"])
def test_bodies_that_use_dynamic_sizes(name: str) -> None:
    module, x = EXAMPLES[name]()
    fn, graphs = compiled_call(module)
    for copies in (5, 6, 7, 4):  # conv2d is another kernel for less than 16
        p, same, xs = state_of(module, seed=1), state_of(module, seed=1), torch.cat([x] * copies)
        assert_close(fn(p, xs), call(module, same, xs))
        assert_close(p, same)
    assert len(graphs) == 2


@pytest.mark.parametrize("scales", [(3, 4, 5, 6), (0.5, 1.5, 2.5, 3.5)])
def test_numbers_among_the_arguments(scales: tuple[float, ...]) -> None:
    torch._dynamo.reset()
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    backend, graphs = recording()
    fn = torch.compile(
        lambda p, x, scale: call(module, p, x, {"scale": scale}), fullgraph=True, backend=backend
    )
    for scale in scales:
        assert_close(fn(p, x, scale), call(module, p, x, {"scale": scale}))
    assert len(graphs) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_values_are_no_reason(name: str) -> None:
    module, x = EXAMPLES[name]()
    fn, graphs = compiled_call(module)
    for seed in range(3):
        p, same = state_of(module, seed=seed), state_of(module, seed=seed)
        assert_close(fn(p, x), call(module, same, x))
        assert_close(p, same)
    assert len(graphs) == 1


def test_what_is_written_back_is_no_reason() -> None:
    fn, graphs = compiled_call(Counter())
    p = {"foo": torch.zeros(())}
    for step in range(1, 4):
        assert_close(fn(p, torch.zeros(2)), torch.full((2,), float(step)))
    assert len(graphs) == 1


def test_values_of_the_module_s_own_tensors_are_no_reason() -> None:
    module, x = EXAMPLES["MLP"]()
    fn, graphs = compiled_call(module)
    p = {"l1.weight": torch.rand(4, 3)}
    for _ in range(3):
        with torch.no_grad():
            module.l2.weight.mul_(2)
        assert_close(fn(p, x), call(module, p, x))
    assert len(graphs) == 1


class Switched(MLP):
    """Reads attributes of its own while it is traced."""

    power = 1
    twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x, scale=self.power)
        return y * 2 if self.twice else y


def untie(module: nn.Module) -> None:
    module.out.weight = nn.Parameter(module.embed.weight.detach().clone() + 1)


def tie_l2_to_l1(module: nn.Module) -> None:
    module.l2.bias = nn.Parameter(torch.rand(4))
    module.l1.bias = module.l2.bias
    module.l2.weight = nn.Parameter(torch.rand(4, 4))


def linears(first_bias: bool) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 3, bias=first_bias), nn.Linear(3, 3)), torch.rand(5, 3)


Make = Callable[[], tuple[nn.Module, Tensor]]

CHANGES: dict[str, tuple[Make, str, Callable[[nn.Module], Any]]] = {
    "untied": (EXAMPLES["Tied"], "embed.weight", untie),
    "tied": (
        lambda: linears(first_bias=True),
        "0.bias",
        lambda m: setattr(m[1], "bias", m[0].bias),
    ),
    "tied, and of another shape": (EXAMPLES["MLP"], "l1.bias", tie_l2_to_l1),
    "shared": (
        lambda: linears(first_bias=True),
        "0.bias",
        lambda m: setattr(m, "1", m[0]),
    ),
    "submodule replaced by another kind": (
        EXAMPLES["MLP"],
        "l2.weight",
        lambda m: setattr(m, "l1", nn.Sequential(nn.Linear(3, 4), nn.ReLU())),
    ),
    "submodule replaced by its like": (
        EXAMPLES["MLP"],
        "l1.weight",
        lambda m: setattr(m, "l2", nn.Linear(4, 2)),
    ),
    "submodule of the given name replaced": (
        EXAMPLES["MLP"],
        "l1.weight",
        lambda m: setattr(m, "l1", nn.Linear(3, 4, bias=False)),
    ),
    "parameter replaced": (
        EXAMPLES["MLP"],
        "l1.weight",
        lambda m: setattr(m.l2, "bias", nn.Parameter(torch.ones(2))),
    ),
    "parameter taken away": (
        EXAMPLES["MLP"],
        "l1.weight",
        lambda m: setattr(m.l2, "bias", None),
    ),
    "parameter added": (
        lambda: linears(first_bias=False),
        "0.weight",
        lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(3))),
    ),
    "parametrized": (
        lambda: linears(first_bias=True),
        "0.weight",
        lambda m: parametrize.register_parametrization(m[1], "weight", Symmetric()),
    ),
    "train to eval": (EXAMPLES["Normed"], "conv.weight", lambda m: m.eval()),
    "eval to train": (EXAMPLES["Normed in eval"], "conv.weight", lambda m: m.train()),
    "a child to eval": (EXAMPLES["Normed"], "conv.weight", lambda m: m.norm.eval()),
    "number read in the trace": (
        lambda: (Switched(), torch.rand(5, 3)),
        "l1.weight",
        lambda m: setattr(m, "power", 3),
    ),
    "flag read in the trace": (
        lambda: (Switched(), torch.rand(5, 3)),
        "l1.weight",
        lambda m: setattr(m, "twice", True),
    ),
    "forward replaced": (
        EXAMPLES["MLP"],
        "l1.weight",
        lambda m: setattr(m, "forward", lambda x: m.encode(x) + 1),
    ),
}
"""An example, a name given a value, and a change that a later call has to follow."""


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_module_are_noticed(change: str) -> None:
    make, name, apply = CHANGES[change]
    module, x = make()
    fn, _ = compiled_call(module)
    p = {name: state_of(module, seed=1)[name]}
    before = fn(p, x)
    apply(module)
    after = call(module, p, x)
    assert before.shape != after.shape or not torch.allclose(before, after)
    for _ in range(2):
        assert_close(fn(p, x), after)


def test_names_and_requires_grad_are_noticed() -> None:
    module, x = EXAMPLES["MLP"]()
    fn, _ = compiled_call(module)
    state = state_of(module, seed=1)
    for p in (
        state,
        {"l1.weight": state["l1.weight"]},
        {"l2.bias": state["l2.bias"]},
        {"l1.weight": state["l1.weight"].double().float().requires_grad_()},
    ):
        actual, expected = fn(p, x), call(module, p, x)
        assert_close(actual, expected)
        assert actual.requires_grad == expected.requires_grad


class Breaks(MLP):
    """Breaks the graph in the middle of its forward."""

    def encode(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().encode(x)


def test_after_a_graph_break_only_the_module_is_compiled() -> None:
    """Dynamo would start graphs at each of fcall's functions, too."""
    clear_compilation_metrics()
    module, x = Breaks(), torch.rand(2, 3)
    capture(lambda p, x: call(module, p, x), state_of(module), x, fullgraph=False)
    files = {metric.co_filename for metric in get_compilation_metrics()}
    own = {Path(file).name for file in files if Path(file).parent == Path(fcall.__file__).parent}
    assert len(files) > 1
    assert own <= {"call.py"}  # functional_call itself, where a graph may start
