"""Writes in place that a transform refuses, and what the error advises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.compiled import run, traced_or_not
from compile_tests.support.models import MLP, Normed
from compile_tests.support.oracle import assert_close, unchanged
from fcall import errors, func, functional_call

Params = dict[str, Tensor]


def split(module: nn.Module) -> tuple[Params, Params]:
    p = {name: value.detach().clone() for name, value in module.named_parameters()}
    return p, {name: value.clone() for name, value in module.named_buffers()}


IMAGES = torch.rand(4, 2, 6, 6)


@traced_or_not
@pytest.mark.parametrize("given", ["captured", "own"])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev"])
def test_a_write_that_grad_refuses(traced: bool, transform: str, given: str) -> None:
    module = Normed()
    p, buffers = split(module)
    apply = getattr(func, transform)

    def loss(p: Params) -> Tensor:
        weights = (p, buffers) if given == "captured" else p
        return functional_call(module, weights, IMAGES).sum()

    def fn(p: Params) -> Any:
        if transform == "jvp":
            return apply(loss, (p,), (p,))
        return apply(loss, p) if transform == "vjp" else apply(loss)(p)

    with unchanged(module), pytest.raises(errors.InPlaceUnderTransformError) as caught:
        run(traced, fn, p)
    for clause in (
        "Normed writes in place under a transform",
        "buffers are ['norm.num_batches_tracked', 'norm.running_mean', 'norm.running_var']",
        "as in grad(f)(params, buffers, x)",
        "return the copies as aux",
        "torch says: During a grad (vjp, jvp, grad, etc) transform",
    ):
        assert clause in str(caught.value)
    if not traced:
        assert str(caught.value.__cause__).startswith("During a grad")


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x)
        return x + self.last


class Adds(Copies):
    """Does what torch refuses in other words."""

    def forward(self, x: Tensor) -> Tensor:
        self.last.mul_(0.9).add_(x)
        return x + self.last


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.sum.sub_(x.sum(), alpha=2)
        return x + self.sum


@traced_or_not
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Normed, IMAGES[:, None]),
        (Copies, torch.rand(2, 3)),
        (Adds, torch.rand(2, 3)),
        (Sums, torch.rand(2, 3)),
    ],
)
def test_a_write_that_vmap_refuses(traced: bool, make: Callable[[], nn.Module], x: Tensor) -> None:
    module = make()
    with pytest.raises(errors.InPlaceUnderTransformError) as caught:
        run(traced, func.vmap(lambda x: functional_call(module, {}, x)), x)
    for clause in (
        f"{make.__name__} writes in place under vmap",
        "Stack the buffers and map over them, as in vmap(f)(params, buffers, x)",
        "fcall.func.replace_all_batch_norm_modules_(module)",
    ):
        assert clause in str(caught.value)


@traced_or_not
def test_the_call_nearest_to_the_write_is_named(traced: bool) -> None:
    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional_call(inner, {}, x)

    inner, outer = Copies(), Outer()
    with pytest.raises(errors.InPlaceUnderTransformError, match=r"^Copies writes"):
        run(traced, func.grad(lambda x: functional_call(outer, {}, x).sum()), torch.rand(3))


def test_other_errors_under_a_transform_stay_as_they_are() -> None:
    module = MLP()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        func.grad(lambda x: functional_call(module, {}, x).sum())(torch.rand(2, 7))
    assert type(caught.value) is RuntimeError


def test_shapes_that_are_wrong_without_vmap_are_no_refusal() -> None:
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape") as caught:
        func.vmap(lambda x: functional_call(Adds(), {}, x))(torch.rand(2, 5, 3))
    assert type(caught.value) is RuntimeError


@traced_or_not
@pytest.mark.parametrize("aux", [False, True])
def test_what_the_error_advises_for_grad(traced: bool, aux: bool) -> None:
    module = Normed()

    def loss(p: Params, buffers: Params) -> Any:
        state = {n: b.clone() for n, b in buffers.items()} if aux else buffers
        out = functional_call(module, (p, state), IMAGES).square().mean()
        return (out, state) if aux else out

    p, buffers = split(module)
    out = run(traced, func.grad(loss, has_aux=aux), p, buffers)
    module(IMAGES).square().mean().backward()
    grads, state = out if aux else (out, buffers)
    assert_close(grads, {name: value.grad for name, value in module.named_parameters()})
    assert_close(state, dict(module.named_buffers()))


@traced_or_not
def test_what_the_error_advises_for_vmap(traced: bool) -> None:
    models = [Normed() for _ in range(2)]
    p, buffers = func.stack_module_state(models)
    member = lambda p, b, x: functional_call(models[0], (p, b), x)  # noqa: E731
    out = run(traced, func.vmap(member, (0, 0, None)), p, buffers, IMAGES)
    assert_close(out, torch.stack([m(IMAGES) for m in models]))
    assert_close(buffers, func.stack_module_state(models)[1])
