"""``fcall.export``: a program that owns nothing, called with the weights and the inputs."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

import fcall
from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Counter,
    Normed,
    Recurrent,
)
from compile_tests.support.oracle import (
    assert_close,
    in_float64,
    loaded,
    state_of,
    unchanged,
)

pytestmark = pytest.mark.compiled


def inputs_of(program: ExportedProgram) -> list[str]:
    assert {s.kind for s in program.graph_signature.input_specs} == {InputKind.USER_INPUT}
    assert not program.state_dict
    assert not program.constants
    return [node.name for node in program.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_model(name: str) -> None:
    module, x = EXAMPLES[name]()
    p = state_of(module)
    with unchanged(module):
        program = fcall.export(module, p, (x,))
    assert_close(p, state_of(module))  # examples are not mutated
    inputs = inputs_of(program)
    assert inputs[:-1] == ["p_" + n.replace(".", "_") for n in p]
    for runnable in (program.module(), program.run_decompositions().module()):
        values, twin = state_of(module, seed=1), loaded(module, state_of(module, seed=1))
        assert_close(runnable(values, x), twin(in_float64(x)), dtype=torch.float32)
        assert_close(values, dict((*twin.named_parameters(), *twin.named_buffers())))


def test_the_order_of_the_dict_is_free() -> None:
    module, x = EXAMPLES["MLP"]()
    run = fcall.export(module, state_of(module), x).module()
    p = state_of(module, seed=1)
    assert_close(run(dict(reversed(p.items())), x), loaded(module, p)(in_float64(x)))


def test_several_dicts_become_one() -> None:
    module, x = Normed(), torch.rand(4, 2, 6, 6)
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    program = fcall.export(module, (params, buffers), x)
    p = state_of(module, seed=1)
    assert_close(program.module()(p, x), loaded(module, p)(in_float64(x)))


def test_other_names_are_refused() -> None:
    module, x = EXAMPLES["MLP"]()
    run = fcall.export(module, state_of(module), x).module()
    p = state_of(module)
    del p["l2.bias"]
    for wrong in (p, {**state_of(module), "more": x}):
        with pytest.raises((ValueError, RuntimeError), match=r"l2\.bias|more"):
            run(wrong, x)


@pytest.mark.parametrize("name", ["MLP", "Normed", "Tied"])
def test_saved_and_loaded(name: str) -> None:
    module, x = EXAMPLES[name]()
    program = fcall.export(module, state_of(module), (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    assert inputs_of(again) == inputs_of(program)
    p, same = state_of(module, seed=1), state_of(module, seed=1)
    assert_close(again.module()(p, x), program.module()(same, x))
    assert_close(p, same)


BATCH = Dim("batch", min=2, max=64)


@pytest.mark.parametrize("shapes", [{"x": {0: BATCH}}, ({0: BATCH},), [{0: Dim.DYNAMIC}]])
def test_a_dynamic_batch(shapes: Any) -> None:
    module, x = EXAMPLES["MLP"]()
    run = fcall.export(module, state_of(module), (x,), dynamic_shapes=shapes).module()
    p = state_of(module, seed=1)
    twin = loaded(module, p)
    for batch in (2, 3, 17):
        x = torch.rand(batch, 3)
        assert_close(run(p, x), twin(in_float64(x)))


def test_a_fixed_batch_stays_fixed() -> None:
    module, x = EXAMPLES["MLP"]()
    run = fcall.export(module, state_of(module), (x,), dynamic_shapes=None).module()
    with pytest.raises((AssertionError, RuntimeError), match=r"x\.size\(\)\[0\] == 5|shape"):
        run(state_of(module), torch.rand(6, 3))


class Scaling(nn.Module):
    """Takes everything by keyword, too; one argument has the name that ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, p: Tensor, *, scale: Tensor, twice: bool = False) -> Tensor:
        return p * self.weight * scale * (2 if twice else 1)


@pytest.mark.parametrize("by_name", [False, True])
def test_keywords_and_an_argument_called_p(by_name: bool) -> None:
    module, x, scale = Scaling(), torch.rand(4, 3), torch.rand(3)
    args, kwargs = ((), {"p": x}) if by_name else ((x,), {})
    kwargs = {**kwargs, "scale": scale, "twice": True}
    shapes = {"p": {0: Dim("batch", min=2)}, "scale": None, "twice": None}
    program = fcall.export(module, state_of(module), args, kwargs, dynamic_shapes=shapes)
    assert inputs_of(program)[0] == "weights_weight"
    x, weight = torch.rand(7, 3), torch.rand(3)
    args, kwargs = ((), {**kwargs, "p": x}) if by_name else ((x,), kwargs)
    assert_close(program.module()({"weight": weight}, *args, **kwargs), x * weight * scale * 2)


class TakesBothNames(nn.Linear):
    def forward(self, p: Tensor, weights: Tensor) -> Tensor:
        return super().forward(p) + weights


class TakesPositionalOnly(nn.Linear):
    def forward(self, x: Tensor, y: Tensor, /) -> Tensor:
        return super().forward(x) + y


class TakesAnyNumber(nn.Linear):
    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return super().forward(xs[0]) + xs[1] + sum(more.values())


class TakesNests(nn.Linear):
    def forward(self, x: dict[str, list[Tensor]], y: tuple[Tensor, float, None] = ()) -> Tensor:
        return super().forward(x["a"][0]) + y[0] * y[1]


X, Y = torch.rand(4, 3), torch.rand(4, 3)

SIGNATURES: dict[str, tuple[type[nn.Linear], tuple[Any, ...], dict[str, Any]]] = {
    "p and weights": (TakesBothNames, (X, Y), {}),
    "positional only": (TakesPositionalOnly, (X, Y), {}),
    "any number": (TakesAnyNumber, (X, Y), {"a": X, "b": Y}),
    "any names": (TakesAnyNumber, (X, Y), {"p": X, "weights": Y}),
    "nests": (TakesNests, ({"a": [X]}, (Y, 2.0, None)), {}),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signatures(case: str) -> None:
    make, args, kwargs = SIGNATURES[case]
    module = make(3, 3)
    program = fcall.export(module, state_of(module), args, kwargs)
    p = state_of(module, seed=1)
    expected = fcall.functional_call(module, p, args, kwargs)
    assert_close(program.module()(p, *args, **kwargs), expected)


def test_another_method() -> None:
    module, x = EXAMPLES["MLP"]()
    program = fcall.export(module, state_of(module), x, method="encode")
    p = state_of(module, seed=1)
    assert_close(program.module()(p, x), loaded(module, p).encode(in_float64(x)))


def test_hooks_are_exported() -> None:
    module, x = EXAMPLES["MLP"]()
    module.register_forward_hook(lambda m, args, out: out * 3)
    program = fcall.export(module, state_of(module), x)
    assert_close(program.module()(state_of(module), x), module(x))


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_tied_weights_are_given_once(name: str) -> None:
    module, tokens = EXAMPLES["Tied"]()
    p = state_of(module)
    p[name] = p.pop("embed.weight")
    program = fcall.export(module, p, tokens)
    assert len(inputs_of(program)) == 4
    p[name] = torch.rand(7, 4)
    assert_close(program.module()(p, tokens), fcall.functional_call(module, p, tokens))


def test_untied() -> None:
    module, tokens = EXAMPLES["Tied"]()
    p = {**state_of(module), "out.weight": torch.rand(7, 4)}
    program = fcall.export(module, p, tokens, tie_weights=False)
    expected = fcall.functional_call(module, p, tokens, tie_weights=False)
    assert_close(program.module()(p, tokens), expected)
    with pytest.raises(fcall.errors.TiedValuesError):
        fcall.export(module, p, tokens)
    with pytest.raises(fcall.errors.MissingValuesError, match=r"out\.weight"):
        fcall.export(module, state_of(module), tokens, tie_weights=False)


@pytest.mark.parametrize(
    ("make", "x", "written"),
    [
        (Normed, torch.rand(4, 2, 6, 6), ["mean", "var", "num_batches_tracked"]),
        (Counter, torch.rand(3), ["foo"]),
    ],
)
def test_state_is_written_into_what_is_given(
    make: Callable[[], nn.Module], x: Tensor, written: list[str]
) -> None:
    module = make()
    program = fcall.export(module, state_of(module), x)
    decomposed = program.run_decompositions()
    kinds = [spec.kind for spec in decomposed.graph_signature.output_specs]
    assert kinds.count(OutputKind.USER_INPUT_MUTATION) == len(written)
    p = state_of(module, seed=1)
    twin = loaded(module, p)
    given = dict(p)
    for _ in range(2):
        decomposed.module()(p, x)
        twin(in_float64(x))
    assert all(p[n] is given[n] for n in p)
    assert_close(p, dict((*twin.named_parameters(), *twin.named_buffers())), dtype=torch.float32)


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.sum()[None]])
        return x


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total.double() + 1
        return x


@pytest.mark.parametrize(
    ("make", "clauses"),
    [
        (Grows, ["reassigns 'seen'", "(1,) torch.float32", "(2,) torch.float32"]),
        (Widens, ["reassigns 'total'", "() torch.float32", "() torch.float64"]),
    ],
)
def test_state_that_changes_its_kind(make: Callable[[], nn.Module], clauses: list[str]) -> None:
    module = make()
    with unchanged(module), pytest.raises(fcall.errors.StateChangedError) as caught:
        fcall.export(module, state_of(module), torch.ones(2))
    for clause in (*clauses, "shape and dtype have to stay the same"):
        assert clause in str(caught.value)


def test_missing_values_are_listed() -> None:
    module = Normed()
    params = dict(module.named_parameters())
    with unchanged(module), pytest.raises(fcall.errors.MissingValuesError) as caught:
        fcall.export(module, params, torch.rand(4, 2, 6, 6))
    message = str(caught.value)
    assert "every parameter and buffer of Normed" in message
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert repr(name) in message
    assert "conv" not in message
    assert isinstance(caught.value, RuntimeError)


WRONG: dict[str, tuple[type[Exception], Callable[[dict[str, Tensor]], Any], dict[str, Any]]] = {
    "strict": (fcall.errors.StrictKeysError, lambda p: {**p, "l3": p["l1.bias"]}, {"strict": True}),
    "path": (fcall.errors.UnknownPathError, lambda p: {**p, "l3.bias": p["l1.bias"]}, {}),
    "value": (fcall.errors.NotATensorError, lambda p: {**p, "l1.bias": 1.0}, {}),
    "twice": (fcall.errors.DuplicateNameError, lambda p: [p, p], {}),
    "dicts": (fcall.errors.InvalidDictsError, lambda p: 1, {}),
    "method": (fcall.errors.UnknownMethodError, lambda p: p, {"method": "encod"}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_mistakes(mistake: str) -> None:
    error, give, options = WRONG[mistake]
    module = MLP()
    with unchanged(module), pytest.raises(error):
        fcall.export(module, give(state_of(module)), torch.rand(2, 3), **options)


def test_an_lstm() -> None:
    module, x = Recurrent(), torch.rand(2, 4, 3)
    with unchanged(module):
        program = fcall.export(module, state_of(module), x)
    inputs_of(program)
    p = state_of(module, seed=1)
    assert_close(program.module()(p, x), loaded(module, p)(in_float64(x)))


def test_gradients_flow_to_the_given_weights() -> None:
    module, x = EXAMPLES["MLP"]()
    run = fcall.export(module, state_of(module), x).module()
    p = {n: v.requires_grad_() for n, v in state_of(module, seed=1).items()}
    grads = torch.autograd.grad(run(p, x).square().sum(), list(p.values()))
    same = {n: v.requires_grad_() for n, v in state_of(module, seed=1).items()}
    out = fcall.functional_call(module, same, x)
    assert_close(grads, torch.autograd.grad(out.square().sum(), list(same.values())))


def test_the_program_compiles_to_one_graph() -> None:
    module, x = EXAMPLES["Attention"]()
    program = fcall.export(module, state_of(module), x)
    torch._dynamo.reset()
    run = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
    p = state_of(module, seed=1)
    assert_close(run(p, x), program.module()(p, x))


def test_the_module_is_not_needed_afterwards() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    expected = loaded(module, p)(in_float64(x))
    program = fcall.export(module, state_of(module), x)
    alive, weight = weakref.ref(module), weakref.ref(module.l1.weight)
    del module
    gc.collect()
    assert alive() is None
    assert weight() is None
    assert_close(program.module()(p, x), expected)
