"""The transforms of ``fcall.func`` that are not torch's own: alone, nested, traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from compile_tests.support.compiled import capture, fresh, run, traced_or_not
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, state_of
from fcall import errors, func, functional_call

Params = dict[str, Tensor]
compiled = pytest.mark.compiled

# --- linearize ----------------------------------------------------------------------------------

X = torch.linspace(0.1, 1, 6, dtype=torch.float64).view(2, 3)
SLOPE, CURVE = X.cos(), X.cos() - X * X.sin()  # of sin(x), and of x * cos(x)


def push_itself(x: Tensor) -> Tensor:
    """``x * cos(x)``, by linearization of ``sin`` at ``x``."""
    return func.linearize(torch.sin, x)[1](x)


@traced_or_not
@pytest.mark.parametrize(
    ("fn", "value"),
    [
        pytest.param(push_itself, X * SLOPE, id="alone"),
        pytest.param(func.grad(lambda x: push_itself(x).sum()), CURVE, id="in grad"),
        pytest.param(func.vmap(push_itself), X * SLOPE, id="in vmap"),
        pytest.param(lambda x: func.jvp(push_itself, (x,), (x,))[1], X * CURVE, id="in jvp"),
        pytest.param(
            lambda x: func.vmap(func.linearize(torch.sin, x)[1])(torch.stack([x, -x])),
            torch.stack([X * SLOPE, -X * SLOPE]),
            id="vmap over tangents",
        ),
    ],
)
def test_linearize_nests(traced: bool, fn: Callable[..., Any], value: Tensor) -> None:
    assert_close(run(traced, fn, X), value)


@compiled
def test_linearize_of_linearize() -> None:
    """Eagerly it is torch's error: ``linearize`` opens a level of forward mode, and only one."""
    fn = lambda x: func.linearize(push_itself, x)[1](x)  # noqa: E731
    assert_close(capture(fn, X).out, X * CURVE)


def test_torchs_linearize_is_wrong_in_grad_and_in_make_fx() -> None:
    """Should this fail, torch has caught up: use its own there, and say so."""
    torch_push = lambda x: torch.func.linearize(torch.sin, x)[1](x)  # noqa: E731
    gradient = torch.func.grad(lambda x: torch_push(x).sum())(X)
    assert not torch.allclose(gradient, CURVE, equal_nan=False)
    assert not torch.allclose(make_fx(torch_push)(X)(X * 2), make_fx(push_itself)(X)(X * 2))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_linearize_recorded_by_make_fx(mode: str) -> None:
    graph = make_fx(push_itself, tracing_mode=mode)(X)
    assert_close(graph(X * 2), 2 * X * (2 * X).cos())


@compiled
@pytest.mark.parametrize("strict", [False, True])
def test_both_can_be_exported(strict: bool) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return func.functionalize(lambda x: push_itself(x).add_(1))(x)

    program = torch.export.export(Both(), (X,), strict=strict)
    assert_close(program.module()(X * 2), 1 + 2 * X * (2 * X).cos())


@traced_or_not
def test_linearize_keeps_the_gradients_of_weights(traced: bool) -> None:
    def fn(p: Params, x: Tensor) -> Tensor:
        return func.linearize(lambda x: functional_call(module, p, x), x)[1](x)

    module, x = MLP(), torch.rand(4, 3)
    p = state_of(module, seed=1)
    p = {name: value.requires_grad_() for name, value in p.items()}
    run(traced, fn, p, x).sum().backward()
    other = fresh(p)
    torch.func.jvp(lambda x: functional_call(module, other, x), (x,), (x,))[1].sum().backward()
    assert_close(p["l1.weight"].grad, other["l1.weight"].grad)


@traced_or_not
def test_linearize_of_nested_arguments(traced: bool) -> None:
    def fn(a: Tensor, b: Tensor) -> Any:
        product = lambda d, s: {"product": d["a"] * d["b"] * s, "one": d["a"]}  # noqa: E731
        out, push = func.linearize(product, {"a": a, "b": b}, b)
        return out, push({"a": b, "b": a}, a)

    out, tangent = run(traced, fn, X, X + 1)
    y = X + 1
    assert_close(out, {"product": X * y * y, "one": X})
    assert_close(tangent, {"product": y * y * y + X * X * y + X * y * X, "one": y})


@compiled
def test_the_approximation_leaves_the_graph() -> None:
    out, push = capture(lambda x: func.linearize(torch.sin, x), X).out
    assert_close((out, push(X)), (X.sin(), X * SLOPE))


@traced_or_not
@pytest.mark.parametrize(
    ("tangents", "message"),
    [
        ((X[0],), "the shape at position 0 is (3,), but (2, 3) was expected."),
        ((X.float(),), "the dtype at position 0 is torch.float32, but torch.float64 was expected."),
        (([X],), "the nesting is "),
        ((X, X), "the nesting is "),
    ],
)
def test_tangents_unlike_the_primals(traced: bool, tangents: Any, message: str) -> None:
    with pytest.raises(errors.TangentsError) as caught:
        run(traced, lambda x, t: func.linearize(torch.sin, x)[1](*t), X, tangents)
    assert message in str(caught.value)


# --- functionalize ------------------------------------------------------------------------------


@traced_or_not
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalize_keeps_what_is_written_into_arguments(traced: bool, remove: str) -> None:
    def fn(x: Tensor, *, by: Tensor) -> Tensor:
        """Add."""
        x.view(-1).add_(1)
        return x * by

    wrapped = func.functionalize(fn, remove=remove)
    assert (wrapped.__name__, wrapped.__doc__) == ("fn", "Add.")
    for call in (
        lambda x: wrapped(x, by=X),
        lambda x: func.functionalize(fn, remove=remove)(x, by=X),
    ):
        x = X.clone()
        assert_close(run(traced, call, x), (X + 1) * X)
        assert_close(x, X + 1)


@traced_or_not
def test_functionalize_in_and_over_grad(traced: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin().mul_(2).sum()

    assert_close(run(traced, func.grad(func.functionalize(f)), X), 2 * SLOPE)
    assert_close(run(traced, func.functionalize(func.grad(f)), X), 2 * SLOPE)


def test_functionalize_recorded_by_make_fx() -> None:
    graph = make_fx(func.functionalize(lambda x: x.clone().add_(1)))(X)
    assert not [n for n in graph.graph.nodes if str(n.target).startswith("aten.add_")]


@traced_or_not
def test_functionalize_with_an_unknown_option(traced: bool) -> None:
    with pytest.raises(errors.FunctionalizeOptionError, match="remove='views'"):
        run(traced, lambda x: func.functionalize(torch.sin, remove="views")(x), X)
