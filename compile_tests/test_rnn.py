"""LSTM, GRU and RNN: as the called module and inside of it, eager, transformed and in one graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fcall
from compile_tests.support.compiled import capture, fresh, run, traced_or_not
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from fcall import errors, func, functional_call

# torch's own, for eager LSTMs with projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

Params = dict[str, Tensor]

KINDS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM with projections": lambda: nn.LSTM(3, 4, proj_size=2, num_layers=2),
    "bidirectional LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "bidirectional LSTM with projections": lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
    "LSTM without biases": lambda: nn.LSTM(3, 4, bias=False, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4, batch_first=True),
    "bidirectional GRU": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "RNN": lambda: nn.RNN(3, 4, bias=False),
    "RNN with relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}
# Steps are unrolled, and take long to compile: the others are for the longer suite.
COMPILED = ["LSTM", "GRU", "bidirectional LSTM with projections"]
each_kind = pytest.mark.parametrize(
    ("kind", "traced"),
    [pytest.param(kind, False, id=f"{kind}-eager") for kind in KINDS]
    + [
        pytest.param(
            kind,
            True,
            id=f"{kind}-compiled",
            marks=[pytest.mark.compiled] if kind in COMPILED else [pytest.mark.slow],
        )
        for kind in KINDS
    ],
)


class Inside(nn.Module):
    """An RNN between other things."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.rnn = rnn

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x * self.scale)


MAKE: dict[str, Callable[[str], nn.Module]] = {
    "itself": lambda kind: KINDS[kind](),
    "inside": lambda kind: Inside(KINDS[kind]()),
}
X = torch.rand(2, 3, 3)


def sum_of(out: Any) -> Tensor:
    """A number that depends on all of the outputs and states."""
    leaves = torch.utils._pytree.tree_leaves(out)
    return sum((i + 1) * leaf.square().sum() for i, leaf in enumerate(leaves))  # type: ignore[return-value]


TRANSFORMS: dict[str, Callable[[Any, Callable[..., Any]], Callable[..., Any]]] = {
    "forward": lambda F, f: f,
    "grad": lambda F, f: F.grad(lambda p, x: sum_of(f(p, x)), argnums=(0, 1)),
}
# Those have no counterpart in torch: the expected values are computed otherwise.
WITHOUT_RULES = ["vmap over weights", "vmap over inputs", "per-sample gradients", "jvp"]


@pytest.mark.parametrize("where", MAKE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_kind
def test_forward_and_gradients(kind: str, transform: str, where: str, traced: bool) -> None:
    module = MAKE[where](kind)
    p = state_of(module, seed=1)
    with unchanged(module):
        out = run(
            traced, TRANSFORMS[transform](func, lambda p, x: functional_call(module, p, x)), p, X
        )
    twin, p64 = loaded(module, p), in_float64(p)
    oracle = TRANSFORMS[transform](
        torch.func, lambda p, x: torch.func.functional_call(twin, p, (x,))
    )
    assert_close(out, oracle(p64, X.double()))


@each_kind
def test_backward(kind: str, traced: bool) -> None:
    module = Inside(KINDS[kind]())
    p = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    twin = loaded(module, p)
    sum_of(run(traced, lambda p, x: functional_call(module, p, x), p, X)).backward()
    sum_of(twin(X.double())).backward()
    assert_close(
        {name: value.grad for name, value in p.items()},
        {name: value.grad for name, value in twin.named_parameters()},
    )


def expected_without_rule(twin: nn.Module, transform: str, p: Params, x: Tensor) -> Any:
    """What one of :data:`WITHOUT_RULES` gives, by plain calls."""
    call = torch.func.functional_call
    if transform == "vmap over weights":
        halves = [{name: value * scale for name, value in p.items()} for scale in (1, 0.5)]
        return stacked([call(twin, half, (x,)) for half in halves])
    if transform == "vmap over inputs":
        return stacked([call(twin, p, (one[None],)) for one in x])
    if transform == "per-sample gradients":
        loss = lambda p, x: sum_of(call(twin, p, (x[None],)))  # noqa: E731
        return stacked([torch.func.grad(loss)(p, one) for one in x])
    step = 1e-6
    ahead, behind = (
        call(twin, {name: value * (1 + sign * step) for name, value in p.items()}, (x,))
        for sign in (1, -1)
    )
    return torch.utils._pytree.tree_map(lambda a, b: (a - b) / (2 * step), ahead, behind)


def stacked(outs: list[Any]) -> Any:
    return torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *outs)


def without_rule(module: nn.Module, transform: str) -> Callable[..., Any]:
    f = lambda p, x: functional_call(module, p, x)  # noqa: E731
    if transform == "vmap over weights":
        return lambda p, x: func.vmap(f, (0, None))(
            {name: torch.stack([value, value * 0.5]) for name, value in p.items()}, x
        )
    if transform == "vmap over inputs":
        return func.vmap(lambda p, x: f(p, x[None]), (None, 0))
    if transform == "per-sample gradients":
        return func.vmap(func.grad(lambda p, x: sum_of(f(p, x[None]))), (None, 0))
    return lambda p, x: func.jvp(lambda p: f(p, x), (p,), (p,))[1]


@pytest.mark.parametrize("transform", WITHOUT_RULES)
@each_kind
def test_transforms_that_torch_has_no_rule_for(kind: str, transform: str, traced: bool) -> None:
    module = Inside(KINDS[kind]())
    p = state_of(module, seed=1)
    with unchanged(module):
        out = run(traced, without_rule(module, transform), p, X)
    twin = loaded(module, p)
    with torch.no_grad() if transform != "per-sample gradients" else torch.enable_grad():
        expected = expected_without_rule(twin, transform, in_float64(p), X.double())
    assert_close(out, expected)


def test_torch_has_no_rule_for_vmap() -> None:
    """Should this fail, torch has caught up: see whether its own is as good."""
    module = nn.LSTM(3, 4)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda x: torch.func.functional_call(module, {}, (x,)))(X)


def test_an_unbatched_input_and_a_given_state() -> None:
    module = nn.LSTM(3, 4, num_layers=2)
    state = torch.rand(2, 4), torch.rand(2, 4)
    out = func.vmap(lambda x: functional_call(module, {}, (x, state)))(X)
    assert_close(out, stacked([module(x, state) for x in X]))


@traced_or_not
def test_an_ensemble(traced: bool) -> None:
    models = [Inside(nn.LSTM(3, 4)) for _ in range(3)]
    ensemble = fcall.Ensemble(models)
    assert_close(run(traced, ensemble, X), stacked([model(X) for model in models]))


@traced_or_not
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_in_a_block(transform: str, traced: bool) -> None:
    def called(p: Params) -> Tensor:
        with fcall.substitute(module, p):
            return sum_of(module(X))

    module = Inside(nn.LSTM(3, 4))
    p = state_of(module, seed=1)
    both = {name: torch.stack([value, value]) for name, value in p.items()}
    out = (
        run(traced, func.grad(called), p)
        if transform == "grad"
        else run(traced, func.vmap(called), both)
    )
    call = torch.func.functional_call
    if transform == "vmap":
        assert_close(out, sum_of(call(module, p, (X,))).expand(2))
    else:
        assert_close(out, torch.func.grad(lambda p: sum_of(call(module, p, (X,))))(p))


# --- Dropout between layers ---------------------------------------------------------------------


@traced_or_not
def test_dropout_between_layers(traced: bool) -> None:
    """With a probability of 1 the second layer sees nothing, which is no matter of chance."""
    module = nn.LSTM(3, 4, num_layers=2, dropout=1.0)
    out = run(traced, lambda x: functional_call(module, {}, x), X)
    assert_close(out, module(X))
    assert not torch.allclose(out[0], copy.deepcopy(module).eval()(X)[0])


@pytest.mark.compiled
def test_torch_compiles_dropout_away() -> None:
    """Should this fail, torch has caught up: compile its own."""
    module = nn.LSTM(3, 4, num_layers=2, dropout=1.0)
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        out = torch.compile(module, backend="aot_eager")(X)
    assert_close(out, module.eval()(X))


# --- What is not supported ----------------------------------------------------------------------


def test_a_packed_sequence_under_vmap() -> None:
    module = Inside(nn.LSTM(3, 4))
    packed = pack_sequence([torch.rand(4, 3), torch.rand(2, 3)])
    p = {"rnn.weight_hh_l0": torch.rand(2, 16, 4)}

    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = module.rnn

        def forward(self) -> Any:
            return self.rnn(packed)[0].data

    with pytest.raises(errors.PackedSequenceError, match="Give the RNN a padded sequence"):
        func.vmap(lambda p: functional_call(Packs(), p))(p)
    assert_close(functional_call(Packs(), {}), Packs()())


# --- The function itself, which Dynamo is not to look at the module of --------------------------


@pytest.mark.compiled
@pytest.mark.parametrize(
    "call", [functional_call, fcall.stateless.unwarned_functional_call], ids=["own", "stateless"]
)
def test_the_older_names_take_rnns_too(call: Callable[..., Any]) -> None:
    module = nn.LSTM(3, 4)
    p = state_of(module, seed=1)
    assert_close(capture(lambda p: call(module, p, X), p).out, call(module, p, X))


@pytest.mark.compiled
def test_torch_func_does_not_compile_them() -> None:
    """Should this stop raising, torch.func has caught up: say so in the documentation."""
    module = nn.LSTM(3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        capture(lambda p: torch.func.functional_call(module, p, (X,)), state_of(module, seed=1))


@pytest.mark.compiled
def test_compiled_by_fcall() -> None:
    module = nn.GRU(3, 4)
    p = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    q = fresh(p)
    sum_of(fcall.compile(module, backend="aot_eager")(p, X)).backward()
    sum_of(functional_call(module, q, X)).backward()
    assert_close(p["weight_hh_l0"].grad, q["weight_hh_l0"].grad)


@pytest.mark.parametrize("name", ["fcall.functional_call", "fcall.stateless.functional_call"])
def test_the_function_is_pickled_by_name(name: str) -> None:
    fn = functional_call if name.count(".") == 1 else fcall.stateless.functional_call
    assert pickle.loads(pickle.dumps(fn)) == fn
    assert copy.deepcopy(fn) == fn
