"""The fast route of ``fcall.compile``: when it is taken, and what it gives."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import backward, fresh, gradients, recording
from compile_tests.support.fast import fast_call, readings, route_of
from compile_tests.support.memory import live_tensors
from compile_tests.support.models import EXAMPLES, Counter, Recurrent, Tied
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*EXAMPLES, "Recurrent"])
def test_results_and_gradients(name: str) -> None:
    module, x = EXAMPLES.get(name, lambda: (Recurrent(), torch.rand(2, 3, 3)))()
    fn, graphs = fast_call(module, state_of(module), x)
    buffers = dict(module.named_buffers())
    for grad in (False, True, True):
        p = state_of(module, seed=1)
        for key, value in p.items():
            value.requires_grad_(grad and key not in buffers)
        same = fresh(p)
        xs = x.clone().requires_grad_(grad and x.is_floating_point())
        x2 = fresh(xs)
        with unchanged(module):
            out = fn(p, xs)
            backward(out)
        expected = call(module, same, x2)
        backward(expected)
        assert_close(out, expected)
        assert_close(p, same)
        assert_close(gradients([p, xs]), gradients([same, x2]))
    assert len(graphs) == 2
    assert route_of(fn, p, xs)[1].kind == "fast"


class Transposes(nn.Module):
    """Changes the strides of a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.rand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.square.t_()


@pytest.mark.inductor  # whose code has the strides in it
def test_a_call_that_changes_what_the_next_is_checked_against() -> None:
    module, x = Transposes(), torch.rand(2, 3)
    fn = fcall.compile(module)
    p = state_of(module, seed=1)
    same = fresh(p)
    for _ in range(4):
        assert_close(fn(p, x), call(module, same, x))
        assert p["square"].stride() == same["square"].stride()


def test_one_compilation_for_all_ways_to_give_the_same_weights() -> None:
    module, x = EXAMPLES["MLP"]()
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    p = state_of(module, seed=1)
    expected = loaded(module, p)(in_float64(x))
    for given in readings(p):
        assert_close(fn(given, x), expected)
    assert len(graphs) == 1
    for given in readings(p):
        out, route = route_of(fn, given, x)
        assert_close(out, expected)
        assert route.kind == "fast"

    torch_graphs = recording()
    compiled = torch.compile(
        lambda p, x: torch.func.functional_call(module, p, (x,)), backend=torch_graphs[0]
    )
    for given in readings(p)[:4]:
        compiled(given, x)
    assert len(torch_graphs[1]) == 4  # should this fail, torch has caught up


def test_parameters_and_tensors_with_gradients_are_one_compilation() -> None:
    module, x = EXAMPLES["MLP"]()
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    p = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    same = {name: nn.Parameter(value.detach().clone()) for name, value in p.items()}
    twin = loaded(module, p)
    backward(twin(in_float64(x)))
    expected = gradients(list(twin.parameters()))
    for _ in range(2):
        for given in (p, same):
            for value in given.values():
                value.grad = None
            backward(fn(given, x))
            assert_close(gradients(list(given.values())), expected)
    assert len(graphs) == 1


def test_tied_names_given_once_or_twice() -> None:
    module, x = Tied(), torch.arange(5)
    p = state_of(module, seed=1)
    once = {name: value for name, value in p.items() if name != "out.weight"}
    twice = {**once, "out.weight": once["embed.weight"]}
    other = {
        "out.weight": once["embed.weight"],
        "mix.weight": p["mix.weight"],
        "mix.bias": p["mix.bias"],
    }
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    expected = loaded(module, once)(x)
    for _ in range(2):
        for given in (once, twice, other):
            assert_close(fn(given, x), expected)
    assert len(graphs) == 1
    assert route_of(fn, twice, x)[1].kind == "fast"
    with pytest.raises(fcall.errors.TiedValuesError, match=r"embed\.weight.*tied in Tied"):
        fn({**twice, "out.weight": p["embed.weight"].clone()}, x)


@pytest.mark.parametrize("count", [1, 4, 64])
def test_any_number_of_weight_sets(count: int) -> None:
    module, x = EXAMPLES["MLP"]()
    sets = [state_of(module, seed=seed) for seed in range(count)]
    fn, graphs = fast_call(module, sets[0], x)
    for p in sets:
        out, route = route_of(fn, p, x)
        assert route.kind == "fast"
        assert_close(out, loaded(module, p)(in_float64(x)))
    assert len(graphs) == 1
    assert len(fn._routes) == 1


def test_weights_whose_class_the_trace_asks_for() -> None:
    """As pytree does, where ``vmap`` gets the parameters of an ensemble: the trace sees tensors."""
    models = [EXAMPLES["MLP"]()[0] for _ in range(3)]
    ensemble, x = fcall.Ensemble(models), torch.rand(2, 3)
    fn, graphs = fast_call(ensemble, state_of(ensemble), x)
    own = dict(ensemble.named_parameters())
    fn(own, x)
    out, route = route_of(fn, own, x)
    assert route.kind == "fast"
    assert_close(out, torch.stack([model(x) for model in models]))
    backward(out)
    assert all(p.grad is not None for p in own.values())
    assert len(graphs) == 2  # without and with gradients


def test_weights_are_not_kept_alive() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module)
    fn, _ = fast_call(module, p, x)
    fn(p, x)
    storages = [value.data_ptr() for value in p.values()]
    del p
    alive = {t.data_ptr() for t in live_tensors() if not t.is_meta}
    assert not alive & set(storages)


def test_state_is_written_back_by_the_fast_route() -> None:
    module = Counter()
    fn, _ = fast_call(module, {"foo": torch.zeros(())}, torch.zeros(2))
    buffers = {"foo": torch.tensor(3.0)}
    given = buffers["foo"]
    for step in (4.0, 5.0):
        out, route = route_of(fn, [{}, buffers], torch.zeros(2))
        assert (buffers["foo"], out[0], route.kind) == (step, step, "fast")
    assert given == 3
    with pytest.raises(fcall.errors.ReadOnlyMappingError, match="'foo'"):
        fn(types.MappingProxyType(buffers), torch.zeros(2))


def test_double_backward_is_as_under_torch_compile() -> None:
    module, x = EXAMPLES["MLP"]()
    p = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    fn, _ = fast_call(module, p, x)
    first = torch.autograd.grad(fn(p, x).square().sum(), list(p.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first[0].sum(), list(p.values()))


def test_other_sizes() -> None:
    module, _ = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, graphs = fast_call(module, p, torch.rand(5, 3))
    for batch in (5, 7, 9, 11, 5, 7):
        x = torch.rand(batch, 3)
        assert_close(fn(p, x), loaded(module, p)(in_float64(x)))
    assert len(graphs) == 2
    assert len(fn._routes) == 1
    assert route_of(fn, p, torch.rand(13, 3))[1].kind == "fast"


def test_arguments_of_all_kinds() -> None:
    class Takes(nn.Linear):
        def forward(self, nest: Any, *, scale: float, mask: Any = None, dtype: Any = None) -> Any:
            x, others = nest
            out = super().forward(x) * scale + sum(others.values())
            return {"out": out if mask is None else out * mask, "dtype": dtype}

    module = Takes(2, 2)
    p = state_of(module, seed=1)
    x, t = torch.rand(3, 2), torch.rand(2)
    fn = fcall.compile(module, backend="aot_eager")
    for scale, mask in ((2.0, None), (3.0, None), (2.0, t * 2), (2.0, None)):
        for others in ({"a": t}, {"a": t, "b": t + 1}):
            for _ in range(2):
                kwargs = {"scale": scale, "mask": mask, "dtype": torch.float32}
                out, route = route_of(fn, p, (x, others), **kwargs)
                expected = call(module, p, ((x, others),), kwargs)
                assert_close(out["out"], expected["out"])
                assert out["dtype"] is torch.float32
            assert route.kind == "fast"


def test_sizes_of_one_module_do_not_vary_those_of_another() -> None:
    backend, graphs = recording()
    for width in (3, 5):
        module = nn.Linear(width, 2)
        fcall.compile(module, backend=backend)(state_of(module), torch.rand(4, width))
    for graph in graphs:
        inputs = graph.graph.find_nodes(op="placeholder")
        assert len(inputs) == 3  # and none that is a size
