"""``fcall.compile`` with CUDA graphs: which sets of weights are read where they are.

On the CPU something else stands for the graphs: see ``support/recorded.py``.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cudagraph_trees

import fcall
from compile_tests.support.compiled import backward, fresh, gradients
from compile_tests.support.devices import CUDA, Values, values_of
from compile_tests.support.fast import route_of
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, in_float64, loaded, unchanged
from compile_tests.support.recorded import Recordings, recordings
from compile_tests.support.threads import run
from fcall.compiled import weight_sets

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.inductor,
    pytest.mark.parametrize("device", [CUDA, "cpu"], indirect=True),
]


class Normed(nn.Module):
    """Writes to buffers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out


class Previous(nn.Module):
    """Reassigns two buffers, one of them with what the other was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.zeros(3))
        self.register_buffer("before", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.before
        self.before, self.now = self.now, self.now + 1
        return out


class Clamped(nn.Module):
    """Writes to a parameter, out of autograd's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(max=0.5)
        return x * self.weight


class Recurrent(nn.Module):
    """Writes to a buffer what has gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_buffer("state", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.state.copy_(torch.tanh(x * self.weight + self.state))
        return self.state * 2


class Transposed(nn.Module):
    """Changes the strides of a buffer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.rand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.square.t_()


class Overlapping(nn.Module):
    """Writes to one of its buffers, and reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(3))
        self.register_buffer("other", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.one.add_(x.sum())
        return self.other * 2


class Shown(nn.Module):
    """Returns one of its weights, and a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ self.weight, self.weight, self.weight[1]


class Breaking(nn.Module):
    """Has a list of the same name as that of the weights where it goes on after a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = [x, x + 1]
        torch._dynamo.graph_break()
        return self.linear(weights[0] * weights[1])


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": Normed,
    "reassigned": Previous,
    "Parameter": Clamped,
    "gradients": Recurrent,
    "strides": Transposed,
}


TREES = {"triton.cudagraphs": True}


@pytest.fixture
def found(device: str) -> Iterator[Recordings]:
    with recordings(device) as found:
        yield found


class Call:
    """A compiled module, called beside the oracle."""

    def __init__(self, module: nn.Module, device: str, **options: Any) -> None:
        self.module = module.to(device)
        self.x = torch.rand(2, 3, device=device)
        self.fn = fcall.compile(self.module, mode="reduce-overhead", **options)

    def values(self, seed: int, *, learned: bool = False) -> Values:
        return values_of(self.module, seed, learned=learned)

    def check(self, given: Values) -> None:
        """Call, and compare the output, gradients, and what is written."""
        for value in given.values():
            value.grad = None
        same = fresh(given)
        learned = any(value.requires_grad for value in given.values())
        with unchanged(self.module), torch.set_grad_enabled(learned):
            out = self.fn(given, self.x)
            expected = fcall.functional_call(self.module, same, (self.x,))
        assert_close(out, expected)
        if learned:
            backward(out)
            backward(expected)
            assert_close(gradients(given), gradients(same))
        assert_close(given, same)


def addresses_of(given: Values) -> set[int]:
    return {value.data_ptr() for value in given.values()}


def graphs_of(found: Recordings, given: Values) -> int:
    """How many recordings read these weights where they are."""
    return sum(addresses_of(given) <= {*addresses} for addresses in found.static)


@pytest.mark.parametrize("learned", [False, True])
def test_sets_that_come_back_are_not_copied(device: str, found: Recordings, learned: bool) -> None:
    call = Call(MLP(), device)
    sets = [call.values(seed, learned=learned) for seed in range(4)]
    for given in (*sets, *sets, *sets, *sets[::-1]):
        call.check(given)
        with torch.no_grad():
            for value in given.values():  # as an optimizer does
                value.mul_(0.9)
    assert [graphs_of(found, given) for given in sets] == [1] * 4
    assert len(found.static) == 5
    by_copy, static = len(sets[0]) + 1, 1
    assert sorted(found.copied) == [*[static] * 4, by_copy], "the input; once the weights, too"


def test_one_set_is_compiled_once(device: str, found: Recordings) -> None:
    call = Call(MLP(), device)
    given = call.values(1)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        call.check(given)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_sets_that_are_new_each_time(device: str, found: Recordings) -> None:
    """One graph does for all of them, and what is recorded does not grow."""
    call = Call(MLP(), device)
    kept = [call.values(seed) for seed in range(12)]  # alive, so that no address comes back
    for given in kept:
        call.check(given)
    assert len(found.static) <= 2  # a real graph is not recorded in its first call
    assert not any(graphs_of(found, given) for given in kept[1:])


@pytest.mark.parametrize("static_sets", [0, 1, 2])
def test_as_many_as_were_asked_for(device: str, found: Recordings, static_sets: int) -> None:
    call = Call(MLP(), device, static_sets=static_sets)
    sets = [call.values(seed) for seed in range(3)]
    for given in sets * 3:
        call.check(given)
    assert sum(graphs_of(found, given) for given in sets) == static_sets
    assert len(found.static) == static_sets + 1


def test_more_sets_than_are_remembered(
    device: str, found: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sets, "SEEN", 2)
    call = Call(MLP(), device)
    sets = [call.values(seed) for seed in range(5)]
    for given in sets * 3:
        call.check(given)
    assert len(found.static) <= 2, "none but the first comes back soon enough"
    for given in sets[1:3] * 3:
        call.check(given)
    assert [graphs_of(found, given) for given in sets] == [1, 1, 1, 0, 0]


def _replaced(given: Values) -> Values:
    return {name: value.clone() for name, value in given.items()}


def _moved(given: Values) -> Values:
    for value in given.values():
        value.data = value.detach() * 2
    return given


def _freed(given: Values) -> Values:
    copies = {name: value.detach().cpu() for name, value in given.items()}
    device = given["l1.weight"].device
    given.clear()
    gc.collect()
    return {name: value.to(device) + 1 for name, value in copies.items()}


def _one_moved(given: Values) -> Values:
    given["l2.bias"].data = given["l2.bias"].detach() + 1
    return given


def _elsewhere_in_memory(given: Values) -> Values:
    """At an address that no kernel for aligned tensors may be given."""
    for value in given.values():
        memory = value.new_empty(value.numel() + 1)
        value.data = memory[1:].view(value.shape).copy_(value)
    return given


@pytest.mark.parametrize(
    "change",
    [_replaced, _moved, _one_moved, _freed, _elsewhere_in_memory],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("learned", [False, True])
def test_no_stale_address(
    device: str, found: Recordings, change: Callable[[Values], Values], learned: bool
) -> None:
    call = Call(MLP(), device)
    given = call.values(1, learned=learned)
    for _ in range(3):
        call.check(given)
    for _ in range(4):
        given = {n: v.detach().requires_grad_(learned) for n, v in change(given).items()}
        call.check(given)
        call.check(given)
    call.check(call.values(2, learned=learned))
    # Kernels may take it for granted.
    assert not any(address % 16 for addresses in found.static for address in addresses)


def test_sets_with_common_weights(device: str, found: Recordings) -> None:
    """They are told apart, and counted, by the last of their addresses."""
    call = Call(MLP(), device, static_sets=3)
    common = call.values(0)
    sets = [{**common, "l2.bias": torch.rand_like(common["l2.bias"])} for _ in range(6)]
    for given in sets * 3:
        call.check(given)
    assert [graphs_of(found, given) for given in sets] == [1, 1, 1, 0, 0, 0]
    assert len(found.static) == 4


def test_a_call_counts_once(device: str, found: Recordings) -> None:
    """Also one that finds nothing compiled for its inputs, and goes through Dynamo."""
    call = Call(MLP(), device)
    sets = [call.values(seed) for seed in range(4)]
    for given in sets[:2]:
        call.check(given)
    for size, given in zip((5, 7), sets[2:]):
        call.x = torch.rand(size, 3, device=device)
        call.check(given)
    assert [graphs_of(found, given) for given in sets[1:]] == [0, 0, 0]


def test_resized_weights(device: str, found: Recordings) -> None:
    call = Call(nn.Linear(3, 4, bias=False), device)
    given = {"weight": torch.rand(4, 3, device=device)}
    for _ in range(2):
        call.check(given)
    for rows in (8, 4, 2):
        given["weight"].resize_(rows, 3).fill_(0.5)
        call.check(given)


@pytest.mark.parametrize("static_sets", [0, 8])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written(device: str, found: Recordings, kind: str, static_sets: int) -> None:
    """It arrives in the values that were given, whether they are copied or not."""
    call = Call(WRITERS[kind](), device, static_sets=static_sets)
    sets = [call.values(seed) for seed in range(3)]
    for given in sets * 3:
        call.check(given)


def test_weights_that_share_memory(device: str, found: Recordings) -> None:
    """Writing to one of them is seen in the other."""
    call = Call(Overlapping(), device, static_sets=1)
    for seed in range(4):
        memory = torch.full((3,), float(seed), device=device)
        expected = (memory[:3] + call.x.sum()) * 2
        with torch.no_grad():
            out = call.fn({"one": memory, "other": memory.view(3)}, call.x)
        assert_close(out, expected)
        assert_close(memory * 2, expected)


def test_state_that_is_kept(device: str, found: Recordings) -> None:
    """What the module reassigned is the caller's: no other call writes to it."""
    call = Call(Previous(), device)
    kept = []
    with torch.no_grad():
        given = {name: torch.zeros(3, device=device) for name in ("now", "before")}
        for step in range(6):
            assert_close(call.fn(given, call.x), call.x + max(step - 1, 0))
            kept.append(given["now"])
    assert_close(kept, [torch.full((3,), step + 1.0, device=device) for step in range(6)])


def test_state_of_a_call_that_is_compiled_as_it_is_given(device: str, found: Recordings) -> None:
    call = Call(Previous(), device)
    given = {name: torch.zeros(3, device=device) for name in ("now", "before")}
    kept = []
    with torch.no_grad():
        for step in range(5):
            x = given["now"]  # a weight that is an input, too
            out, route = route_of(call.fn, given, x)
            assert "in two places" in route.reason
            assert_close(out, x + max(step - 1, 0))
            kept.append(given["now"])
    assert_close(kept, [torch.full((3,), step + 1.0, device=device) for step in range(5)])


def test_an_output_that_is_a_weight(device: str, found: Recordings) -> None:
    call = Call(Shown(), device)
    sets = [call.values(seed) for seed in range(4)]
    for given in sets * 2:
        with torch.no_grad():
            out = [part.clone() for part in call.fn(given, call.x)]
        expected = call.x @ given["weight"], given["weight"], given["weight"][1]
        assert_close(out, [*expected])


def test_a_list_of_the_users_that_is_called_weights(device: str, found: Recordings) -> None:
    call = Call(Breaking(), device)
    given = call.values(1)
    inputs = [torch.rand(2, 3, device=device) for _ in range(4)]
    for call.x in inputs:
        call.check(given)
    read = {address for addresses in found.static for address in addresses}
    assert not read & {x.data_ptr() for x in inputs}


def test_backward_after_other_calls(device: str, found: Recordings) -> None:
    """What was copied stays there while a graph is to be run backward."""
    call = Call(MLP(), device, static_sets=0)
    for seeds in (range(3), range(3, 6)):
        sets = [call.values(seed, learned=True) for seed in seeds]
        outs = [call.fn(given, call.x) for given in sets]
        for given, out in zip(sets, outs):
            backward(out)
            twin = loaded(call.module, given)
            backward(twin(in_float64(call.x)))
            expected = {name: p.grad for name, p in twin.named_parameters()}
            assert_close(gradients(given), [expected[name] for name in given], dtype=torch.float32)
        del outs, out


@pytest.mark.parametrize("static_sets", [0, 8])
def test_weights_that_are_computed(device: str, found: Recordings, static_sets: int) -> None:
    """Gradients flow on to what weights were made of."""
    call = Call(MLP(), device, static_sets=static_sets)
    base = call.values(1)
    for factor in (0.5, 1.5, 2.5):
        results = []
        for fn in (call.fn, lambda p, x: fcall.functional_call(call.module, p, (x,))):
            scale = torch.tensor(factor, device=device, requires_grad=True)
            out = fn({name: value * scale for name, value in base.items()}, call.x)
            results.append(torch.autograd.grad(out.square().sum(), scale))
        assert_close(*results)


def test_threads(device: str, found: Recordings) -> None:
    if device == "cuda" and "assert" in inspect.getsource(cudagraph_trees.get_obj):
        pytest.skip("this torch records CUDA graphs in the main thread alone")
    call = Call(MLP(), device, static_sets=1)
    sets = [[call.values(10 * i + j) for j in range(3)] for i in range(3)]
    call.check(sets[0][0])

    def calls(mine: Sequence[Values]) -> list[Tensor]:
        with torch.no_grad():
            return [call.fn(given, call.x).clone() for _ in range(5) for given in mine]

    for outs, mine in zip(run(*[lambda mine=mine: calls(mine) for mine in sets]), sets):
        expected = [loaded(call.module, given)(in_float64(call.x)) for given in mine]
        assert_close(outs, expected * 5, dtype=torch.float32)


def test_each_call_begins_a_generation(device: str, found: Recordings) -> None:
    """As a call through torch.compile does: else outputs that are alive have torch record again."""
    from torch._dynamo.mutation_guard import GenerationTracker

    call = Call(MLP(), device)
    given = call.values(1)
    kept = []
    for _ in range(6):
        before = GenerationTracker.generation
        with torch.no_grad():
            kept.append(call.fn(given, call.x))
        assert GenerationTracker.generation > before
    assert len(found.static) == 1


def test_what_is_kept_on_disk(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process knows, without a trace, where weights are read; so it does after a reset."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    module = Normed()
    for kept in (False, True):
        torch._dynamo.utils.counters.clear()
        with recordings(device, cached=True) as found:
            call = Call(module, device, static_sets=1, cache=tmp_path / "calls")
            sets = [call.values(seed) for seed in range(3)]
            for given in sets * 2:
                call.check(given)
            assert sum(graphs_of(found, given) for given in sets) == 1
            for _ in range(2):
                torch.compiler.reset()
                for kind in ("guarded", "fast"):  # the memory of what was recorded is gone
                    with fcall.record_routes() as routes:
                        call.check(sets[0])
                    assert kind in {route.kind for route in routes}
                    for given in sets:
                        call.check(given)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0) is kept


@pytest.mark.parametrize(
    "options",
    [
        {"static_sets": 2},
        {"static_sets": 2, "mode": "default"},
        {"static_sets": 2, "mode": "reduce-overhead", "backend": "aot_eager"},
        {"static_sets": -1, "mode": "reduce-overhead"},
        {"static_sets": 1.5, "mode": "reduce-overhead"},
        {"static_sets": True, "mode": "reduce-overhead"},
        {"static_sets": 1, "options": {**TREES, "triton.cudagraph_trees": False}},
    ],
    ids=str,
)
def test_a_number_that_is_none_or_of_no_use(device: str, options: dict[str, Any]) -> None:
    with pytest.raises(fcall.errors.StaticSetsError, match="a number from 0, where CUDA graphs"):
        fcall.compile(nn.Linear(1, 1), **options)


def test_without_trees_of_graphs_all_is_copied(device: str, found: Recordings) -> None:
    """Only trees of graphs compare addresses: else what is static is read where it was."""
    call = Call(MLP(), device)
    call.fn = fcall.compile(call.module, options={**TREES, "triton.cudagraph_trees": False})
    for given in [call.values(seed) for seed in range(2)] * 2:
        call.check(given)
    assert not any(found.static)


def test_without_cuda_graphs_nothing_is_copied(device: str, found: Recordings) -> None:
    call = Call(MLP(), device)
    call.fn = fcall.compile(call.module)
    for seed in range(3):
        call.check(call.values(seed))
    assert not found.static
