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
from torch.fx.experimental.proxy_tensor import make_fx

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


def test_tied_weights_given_twice_are_one_input() -> None:
    module, tokens = EXAMPLES["Tied"]()
    p = dict(module.named_parameters(remove_duplicate=False))
    program = fcall.export(module, p, tokens)
    assert inputs_of(program) == ["p_embed_weight", "p_mix_weight", "p_mix_bias", "tokens"]
    values = state_of(module, seed=1)
    assert_close(program.module()(values, tokens), fcall.functional_call(module, values, tokens))


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


@pytest.mark.parametrize("name", EXAMPLES)
def test_dynamo_may_read_the_code(name: str) -> None:
    """torch.export's strict mode."""
    module, x = EXAMPLES[name]()
    with unchanged(module):
        program = fcall.export(module, state_of(module), x, export_strict=True)
    inputs_of(program)
    assert not program.graph.find_nodes(op="get_attr")  # of no operator's body
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    values, twin = state_of(module, seed=1), loaded(module, state_of(module, seed=1))
    out = torch.export.load(buffer).module()(values, x)
    assert_close(out, twin(in_float64(x)), dtype=torch.float32)
    assert_close(values, dict((*twin.named_parameters(), *twin.named_buffers())))


def test_nested_arguments_and_two_dynamic_sizes() -> None:
    class Nested(nn.Linear):
        def forward(
            self, x: Tensor, more: dict[str, Any], *, masks: list[Tensor]
        ) -> dict[str, Any]:
            out = super().forward(x) * more["scale"]["by"] * masks[0][..., None]
            return {"out": [out, {"sum": out.sum(1)}], "masks": masks[1]}

    module = Nested(3, 3)
    batch, length = Dim("batch"), Dim("length")

    def inputs(b: int, n: int) -> tuple[Any, Any]:
        masks = [torch.rand(b, n), torch.rand(b)]
        return (torch.rand(b, n, 3), {"scale": {"by": torch.rand(3)}}), {"masks": masks}

    sizes = {
        "x": {0: batch, 1: length},
        "more": {"scale": {"by": None}},
        "masks": [{0: batch, 1: length}, {0: batch}],
    }
    p = state_of(module)
    program = fcall.export(module, p, *inputs(4, 5), dynamic_shapes=sizes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for run in (program.module(), torch.export.load(buffer).module()):
        values, (args, kwargs) = state_of(module, seed=1), inputs(7, 2)
        expected = fcall.functional_call(module, values, args, kwargs)
        assert_close(run(values, *args, **kwargs), expected)


# --- transforms inside of an exported function --------------------------------------------------


class _Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


MODULE = MLP()


def _call(p: Any, x: Tensor) -> Tensor:
    return fcall.functional_call(MODULE, p, x)  # type: ignore[no-any-return]


def _loss(p: Any, x: Tensor) -> Tensor:
    return _call(p, x).square().sum()


TRANSFORMED = {
    "vmap": lambda p, x: fcall.func.vmap(_call, in_dims=(None, 0))(p, x),
    "jvp": lambda p, x: fcall.func.jvp(lambda p: _call(p, x), (p,), (p,)),
    "linearize": lambda p, x: fcall.func.linearize(lambda x: _call(p, x), x)[1](x),
}

WITH_GRADIENTS = {
    "grad": fcall.func.grad(_loss),
    "grad_and_value": fcall.func.grad_and_value(_loss),
    "per sample": fcall.func.vmap(fcall.func.grad(_loss), in_dims=(None, 0)),
    "jacrev": fcall.func.jacrev(_call),
    "hessian": fcall.func.hessian(_loss),
}


def _other_inputs() -> tuple[dict[str, Tensor], Tensor]:
    return state_of(MODULE, seed=5), torch.rand(4, 3)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_inside(name: str) -> None:
    function = TRANSFORMED[name]
    run = torch.export.export(_Calls(function), (state_of(MODULE), torch.rand(4, 3))).module()
    given = _other_inputs()
    assert_close(run(*given), function(*given))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_inside_are_refused(name: str, strict: bool) -> None:
    """torch.export would take values of the examples for constants."""
    example = state_of(MODULE), torch.rand(4, 3)
    with pytest.raises(fcall.errors.ExportedGradientError, match=r"MLP .*\.joint\(loss\)"):
        torch.export.export(_Calls(WITH_GRADIENTS[name]), example, strict=strict)
    assert torch._C._functorch.peek_interpreter_stack() is None


@pytest.mark.filterwarnings("ignore:A model attribute:UserWarning")
def test_torch_exports_gradients_wrongly() -> None:
    """Its graph has no use for the input. Should this fail, torch has caught up."""
    function = torch.func.grad(lambda x: (x @ x.t()).tanh().sum())
    program = torch.export.export(_Calls(function), (torch.rand(4, 3),))
    *_, x = program.graph.find_nodes(op="placeholder")
    assert not x.users


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_traced_first(name: str) -> None:
    example = state_of(MODULE), torch.rand(4, 3)
    traced = make_fx(WITH_GRADIENTS[name])(*example)
    run = torch.export.export(traced, example).module()
    given = _other_inputs()
    assert_close(run(*given), WITH_GRADIENTS[name](*given))


def test_a_program_in_an_exported_gradient_is_refused() -> None:
    example = state_of(MODULE), torch.rand(4, 3)
    program = fcall.trace(MODULE, *example)
    function = fcall.func.grad(lambda p, x: program(p, x).sum())
    with pytest.raises(fcall.errors.ExportedGradientError):
        torch.export.export(_Calls(function), example)


def test_gradients_of_a_program_are_exported_as_a_graph() -> None:
    example = state_of(MODULE), torch.rand(4, 3)
    joint = fcall.trace(MODULE, *example).joint(lambda out: out.square().sum())
    buffer = io.BytesIO()
    torch.export.save(joint.exported(), buffer)
    buffer.seek(0)
    given = _other_inputs()
    (loss, gradients), _ = torch.export.load(buffer).module()(*given)
    expected = fcall.func.grad_and_value(_loss)(*given)
    assert_close((gradients, loss), expected)
