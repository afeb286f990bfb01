"""``fcall.func``: each transform over a call, eager and in one graph, also nested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

import fcall
from compile_tests.support.compiled import capture, check_compiled, run, traced_or_not
from compile_tests.support.models import MLP, Attention, Counter, Normed, Tied
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from fcall import func, functional_call

Params = dict[str, Tensor]
compiled = pytest.mark.compiled


# --- The namespace ------------------------------------------------------------------------------


def test_every_name_of_torch_is_here() -> None:
    names = {name for name in dir(torch.func) if not name.startswith("_")}
    assert names | set(getattr(torch.func, "__all__", ())) <= set(func.__all__)
    assert {"vmap", "grad", "grad_and_value", "vjp", "jvp", "linearize", "hessian"} <= names
    assert all(callable(getattr(func, name)) for name in func.__all__)
    assert fcall.func is func


def test_what_is_not_torchs_own() -> None:
    differing = {n for n in func.__all__ if getattr(func, n) is not getattr(torch.func, n, None)}
    assert differing == {
        "functional_call",
        "functionalize",
        "hessian",
        "jacfwd",
        "jvp",
        "linearize",
        "replace_all_batch_norm_modules_",
        "stack_module_state",
    }
    assert func.functional_call is functional_call


# --- Transforms over a call ---------------------------------------------------------------------


class GroupNormed(nn.Module):
    """A convnet with group norm, ``(batch, 2, 6, 6) -> (batch, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "MLP": (MLP, (4, 3), "l2.weight"),
    "GroupNormed": (GroupNormed, (3, 2, 6, 6), "norm.weight"),
    "Attention": (Attention, (2, 3, 8), "proj.bias"),
    "Tied": (Tied, (5,), "embed.weight"),
}
"""A model, the shape of its input, and a parameter with few numbers."""

# Each is called with the names of torch.func or of fcall.func; the model as a function of the
# one parameter and the input; that parameter; and the input.
Transform = Callable[[Any, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Any]


def loss_of(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, x: f(w, x).square().mean()


def two_of(w: Tensor) -> Tensor:
    return torch.stack([w, w * 0.5])


def cubed(g: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda w, x: g(w, x).pow(3).sum()


def pulled_back(F: Any, f: Any, w: Tensor, x: Tensor) -> Any:
    out, pull = F.vjp(lambda w: f(w, x), w)
    return out, pull(out.detach().cos())


def linearized(F: Any, f: Any, w: Tensor, x: Tensor) -> Any:
    out, push = F.linearize(lambda w: f(w, x), w)
    return out, push(w.cos()), push(w.sin())


SINGLE: dict[str, Transform] = {
    "vmap": lambda F, f, w, x: F.vmap(f, (0, None))(two_of(w), x),
    "grad": lambda F, f, w, x: F.grad(loss_of(f))(w, x),
    "grad_and_value": lambda F, f, w, x: F.grad_and_value(loss_of(f))(w, x),
    "vjp": pulled_back,
    "jvp": lambda F, f, w, x: F.jvp(lambda w: f(w, x), (w,), (w.cos(),)),
    "jacrev": lambda F, f, w, x: F.jacrev(f)(w, x),
    "jacfwd": lambda F, f, w, x: F.jacfwd(f)(w, x),
    "hessian": lambda F, f, w, x: F.hessian(loss_of(f))(w, x),
    "linearize": linearized,
    "functionalize": lambda F, f, w, x: F.functionalize(f)(w, x),
}
NESTED: dict[str, Transform] = {
    "vmap(vmap(grad))": lambda F, f, w, x: F.vmap(
        lambda w: F.vmap(lambda x: F.grad(loss_of(f))(w, x[None]))(x)
    )(two_of(w)),
    "grad(grad(grad))": lambda F, f, w, x: F.grad(cubed(F.grad(cubed(F.grad(loss_of(f))))))(w, x),
    "jacfwd(jacrev(grad))": lambda F, f, w, x: F.jacfwd(F.jacrev(F.grad(loss_of(f))))(w, x),
    "vmap(jvp(grad))": lambda F, f, w, x: F.vmap(
        lambda w: F.jvp(lambda w: F.grad(loss_of(f))(w, x), (w,), (w.cos(),))
    )(two_of(w)),
    "vmap(jacfwd)": lambda F, f, w, x: F.vmap(lambda w: F.jacfwd(f)(w, x))(two_of(w)),
    "vmap(hessian)": lambda F, f, w, x: F.vmap(lambda w: F.hessian(loss_of(f))(w, x))(two_of(w)),
}
TRANSFORMS = {**SINGLE, **NESTED}

# test_transforms.py compiles the others over MLP and Attention.
NOT_COMPILED_ELSEWHERE = {"linearize", "functionalize", *NESTED}
COMPILED = [
    *(("MLP", name) for name in TRANSFORMS if name in NOT_COMPILED_ELSEWHERE),
    *(("Attention", name) for name in TRANSFORMS if name in NOT_COMPILED_ELSEWHERE),
    *(("GroupNormed", name) for name in TRANSFORMS),
    *(("Tied", name) for name in TRANSFORMS),
]


def transformed(name: str, F: Any, call: Any, module: nn.Module, key: str) -> Callable[..., Any]:
    def fn(p: Params, x: Tensor) -> Any:
        return TRANSFORMS[name](F, lambda w, x: call(module, {**p, key: w}, (x,)), p[key], x)

    return fn


def case(model: str) -> tuple[nn.Module, Params, Tensor, str]:
    make, shape, key = MODELS[model]
    torch.manual_seed(0)
    module = make()
    x = torch.arange(shape[0]) if model == "Tied" else torch.rand(shape)
    return module, state_of(module, seed=1), x, key


@functools.cache
def expected(model: str, name: str) -> Any:
    """What torch gives in float64."""
    module, p, x, key = case(model)
    twin, p, x = loaded(module, p), in_float64(p), in_float64(x)
    return transformed(name, torch.func, torch.func.functional_call, twin, key)(p, x)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_transforms_in_eager_mode(model: str, name: str) -> None:
    module, p, x, key = case(model)
    with unchanged(module):
        out = transformed(name, func, functional_call, module, key)(p, x)
    assert_close(out, expected(model, name))


@compiled
@pytest.mark.parametrize(("model", "name"), COMPILED, ids=[f"{m}-{n}" for m, n in COMPILED])
def test_transforms_in_one_graph(model: str, name: str) -> None:
    module, p, x, key = case(model)
    with unchanged(module):
        result = capture(transformed(name, func, functional_call, module, key), p, x)
    assert_close(result.out, expected(model, name))
    assert (len(result.graphs), result.breaks) == (1, 0)
    assert set(result.kinds) == {"operator"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of vmap
@traced_or_not
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "hessian", "linearize", "vmap(jvp(grad))"])
def test_forward_mode_through_batch_norm(traced: bool, name: str) -> None:
    module = Normed().eval()
    p, x = state_of(module, seed=1), torch.rand(4, 2, 6, 6)
    out = run(traced, transformed(name, func, functional_call, module, "norm.weight"), p, x)
    twin = loaded(module, p)
    args = twin, "norm.weight"
    reference = transformed(name, torch.func, torch.func.functional_call, *args)
    assert_close(out, reference(in_float64(p), in_float64(x)))


@compiled
@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(
            lambda w, F: F.jvp(lambda w: group_norm(torch.eye(4)[None], 2, w), (w,), (w,)),
            id="a tangent for the weight alone",
        ),
        pytest.param(
            lambda w, F: F.vmap(F.jacfwd(lambda w: (w * 1.0).sin()))(torch.stack([w, w])),
            id="a number under two transforms",
        ),
        pytest.param(
            lambda w, F: F.vmap(F.hessian(lambda w: (w * 1.0).sin().sum()))(torch.stack([w, w])),
            id="hessian",
        ),
    ],
)
def test_forward_mode_of_functions_without_a_call(fn: Callable[..., Any]) -> None:
    """torch cannot compile these. No test pins that: its failure spoils the process."""
    w = torch.linspace(0.1, 1, 4)
    assert_close(capture(lambda w: fn(w, func), w).out, fn(w, torch.func))


@compiled
def test_per_sample_gradients_of_transforms_made_outside() -> None:
    """Transforms may be applied before the trace, as well as in it."""
    module, p, x, _ = case("MLP")
    f = func.functionalize(lambda p, x: functional_call(module, p, x[None]).square().sum())
    each = func.vmap(func.grad(f), (None, 0))
    check_compiled(each, p, x, module=module)


# --- Randomness ---------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


@traced_or_not
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(traced: bool, randomness: str) -> None:
    """The same or different numbers for each member, always those that follow from the seed."""
    module = Dropped()
    p = {name: torch.stack([value] * 4) for name, value in state_of(module, seed=1).items()}
    x = torch.ones(2, 3)

    def over(call: Any) -> Callable[..., Any]:
        return torch.func.vmap(lambda p, x: call(module, p, x), (0, None), randomness=randomness)

    torch.manual_seed(3)
    out = run(traced, over(functional_call), p, x)
    torch.manual_seed(3)
    assert_close(out, over(torch.func.functional_call)(p, x))
    kept = {tuple(member.ne(0).flatten().tolist()) for member in out}
    assert len(kept) == (1 if randomness == "same" else 4)
    assert 0.2 < out.ne(0).float().mean() < 0.8


@traced_or_not
def test_dropout_under_vmap_is_an_error_by_default(traced: bool) -> None:
    module, x = Dropped(), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        run(traced, func.vmap(lambda x: functional_call(module, {}, x)), x)


@compiled
def test_a_reassigned_buffer_leaves_a_compiled_transform() -> None:
    module = Counter()

    def loss(p: Params, x: Tensor) -> Any:
        p = dict(p)
        return functional_call(module, p, x).prod(), p

    p, x = state_of(module, seed=1), torch.rand(3)
    check_compiled(lambda p, x: func.grad(loss, (0, 1), has_aux=True)(p, x), p, x, module=module)


@compiled
@pytest.mark.parametrize("plain", [False, True])
def test_a_reassigned_buffer_that_stays_in_a_compiled_transform_is_an_error(plain: bool) -> None:
    """That of a plain call: torch cannot return from a graph what belongs to a transform."""
    module = Counter()
    p, x = state_of(module, seed=1), torch.rand(3)

    def loss(p: Params, x: Tensor) -> Tensor:
        return (module(x) if plain else functional_call(module, p, x)).sum()

    with unchanged(module), pytest.raises(RuntimeError, match="storage of TensorWrapper"):
        capture(lambda p, x: func.grad(lambda x: loss(p, x))(x), p, x)
    assert_close(p, state_of(module, seed=1))
