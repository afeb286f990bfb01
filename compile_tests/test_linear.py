"""Linear layers of many members, compiled: the layouts of gradients, and all that is derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import fcall
from compile_tests.support.compiled import capture
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, in_float64
from fcall._torch import is_batched
from fcall.operator import linear

pytestmark = pytest.mark.compiled

MEMBERS = 3


class Deep(nn.Module):
    """``(..., 3) -> (..., 2)``, a layer with no bias and one that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Linear(4, 4, bias=False)
        self.three = nn.Linear(4, 4)
        self.three.weight = self.two.weight
        self.four = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(self.two(self.one(x).tanh()).tanh()).sin())


base = Deep()


def weights() -> dict[str, Tensor]:
    models = [Deep() for _ in range(MEMBERS)]
    return {name: p.detach() for name, p in fcall.stack_module_state(models)[0].items()}


def call(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return fcall.functional_call(base, p, (x,))


def members(p: dict[str, Tensor], x: Tensor, x_dim: int | None = None) -> Tensor:
    return vmap(call, in_dims=(0, x_dim))(p, x)


def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return members(p, x).square().sum()


def shifted(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cos() for name, value in p.items()}


DERIVED: dict[str, Callable[[dict[str, Tensor], Tensor], Any]] = {
    "outputs": members,
    "gradients": grad(loss),
    "gradients of inputs": grad(loss, argnums=1),
    "vjp": lambda p, x: vjp(members, p, x)[1](torch.ones(MEMBERS, 5, 2, dtype=x.dtype)),
    "jvp": lambda p, x: jvp(members, (p, x), (shifted(p), x.cos())),
    "jvp of the inputs": lambda p, x: jvp(lambda x: members(p, x), (x,), (x.cos(),)),
    "jacobian": jacrev(members),
    "forward over reverse": lambda p, x: jvp(lambda p: grad(loss)(p, x), (p,), (shifted(p),))[1],
    "reverse over reverse": lambda p, x: grad(
        lambda p: sum(g.square().sum() for g in grad(loss)(p, x).values())
    )(p),
    "hessian of the inputs": lambda p, x: hessian(loss, argnums=1)(p, x[:2]),
    "an input each": lambda p, x: members(p, x.expand(MEMBERS, 5, 3) * 2, 0),
    "an input each, along another dimension": lambda p, x: grad(
        lambda p: members(p, torch.stack([x, x.sin(), x.cos()], 2), 2).square().sum()
    )(p),
    "a batch of batches": lambda p, x: grad(lambda p: loss(p, x.expand(2, 4, 5, 3)))(p),
    "one sample": lambda p, x: grad(lambda p: loss(p, x[0]))(p),
    "no samples": lambda p, x: grad(lambda p: loss(p, x[:0]))(p),
    "a transform inside": vmap(grad(lambda p, x: call(p, x).square().sum()), in_dims=(0, None)),
    "a sample each, too": vmap(vmap(call, in_dims=(None, 0)), in_dims=(0, None)),
    "members of members": lambda p, x: vmap(members, in_dims=(0, None))(
        {name: torch.stack([value, value.sin()]) for name, value in p.items()}, x
    ),
}


@pytest.mark.parametrize("what", DERIVED)
def test_what_is_derived(what: str) -> None:
    p, x = weights(), torch.rand(5, 3)
    expected = DERIVED[what](in_float64(p), in_float64(x))
    result = capture(DERIVED[what], p, x)
    assert_close(result.out, expected, dtype=torch.float32)
    assert (len(result.graphs), result.breaks) == (1, 0)
    assert set(result.kinds) == {"operator"}


@pytest.mark.parametrize("shared", ["one.weight", "one.bias"])
def test_a_parameter_that_all_members_share(shared: str) -> None:
    def gradients(p: dict[str, Tensor], own: Tensor, x: Tensor) -> Any:
        def total(p: dict[str, Tensor], own: Tensor) -> Tensor:
            rest = {name: value for name, value in p.items() if name != shared}
            each = vmap(lambda rest: call({**rest, shared: own}, x))
            return each(rest).square().sum()

        return grad(total, argnums=(0, 1))(p, own)

    p, x = weights(), torch.rand(5, 3)
    expected = gradients(in_float64(p), in_float64(p[shared][0]), in_float64(x))
    result = capture(gradients, p, p[shared][0], x)
    assert_close(result.out, expected, dtype=torch.float32)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_gradients_have_the_layout_of_the_weights(backend: str) -> None:
    p, x = weights(), torch.rand(5, 3)
    gradients = capture(grad(loss), p, x, backend=backend).out
    assert {n: g.stride() for n, g in gradients.items()} == {n: v.stride() for n, v in p.items()}


def test_gradients_by_autograd_have_the_layout_of_the_weights() -> None:
    ensemble = fcall.Ensemble([MLP() for _ in range(MEMBERS)])
    x = torch.rand(5, 3)
    out = capture(ensemble, x).out
    gradients = torch.autograd.grad(out.sum(), list(ensemble.parameters()))
    assert [g.stride() for g in gradients] == [p.stride() for p in ensemble.parameters()]


def test_autocast() -> None:
    def gradients(p: dict[str, Tensor], x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return grad(loss)(p, x)

    p, x = weights(), torch.rand(5, 3)
    expected = grad(loss)(in_float64(p), in_float64(x))
    assert_close(capture(gradients, p, x).out, expected, dtype=torch.bfloat16)


def test_mixed_dtypes_are_refused_as_without() -> None:
    p, x = weights(), torch.rand(5, 3, dtype=torch.float64)
    with pytest.raises(Exception, match="dtype"):
        capture(members, p, x)


def test_batches_of_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    p = weights()
    for count in (5, 7, 9):
        x = torch.rand(count, 3)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert_close(compiled(p, x), grad(loss)(in_float64(p), in_float64(x)), dtype=torch.float32)


def test_no_other_operation_of_a_body_is_touched() -> None:
    seen = []

    def body(x: Tensor, weight: Tensor) -> Tensor:
        return torch._C._nn.linear(x, weight).tanh()

    graph = torch.fx.symbolic_trace(body)

    def under_vmap(weight: Tensor, x: Tensor) -> Tensor:
        seen.append(is_batched(weight))
        return linear.run(graph, (x, weight))

    weight, x = torch.rand(MEMBERS, 4, 3), torch.rand(5, 3)
    assert_close(vmap(under_vmap, in_dims=(0, None))(weight, x), torch.tanh(x @ weight.mT))
    assert seen == [True]
    assert_close(linear.run(graph, (x, weight[0])), torch.tanh(x @ weight[0].mT))
