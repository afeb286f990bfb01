"""Calls that are begun while another is under way, on one thread."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall
from compile_tests.support.models import Counter
from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import both

ONE = torch.ones(())


def scalar(value: float) -> dict[str, Tensor]:
    """Return values for a :class:`Scale`."""
    return {"weight": torch.tensor(value)}


class Scale(nn.Module):
    """Multiplies by a weight that is 2, before and after it does something ``between``."""

    def __init__(self, between: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        before = self.weight
        self.between()
        assert self.weight is before
        return x * self.weight


class Power(nn.Module):
    """Calls itself, each time with a weight one larger."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.call = call

    def forward(self, depth: int) -> Tensor:
        if depth == 0:
            return self.weight
        inner = self.call(self, {"weight": self.weight + 1}, (depth - 1,))
        return self.weight * inner


@both
@pytest.mark.parametrize("depth", [0, 1, 5, 50])
def test_recursion(call: Any, depth: int) -> None:
    module = Power(call)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with unchanged(module):
        out = call(module, {"weight": weight}, (depth,))
        (gradient,) = torch.autograd.grad(out, weight)
    terms = weight.detach() + torch.arange(depth + 1)
    torch.testing.assert_close(out.detach(), terms.prod())
    torch.testing.assert_close(gradient, terms.prod() * (1 / terms).sum())


class Half(nn.Module):
    """One of two modules that call each other; neither is a submodule of the other."""

    other: list[Half]

    def __init__(self, weight: float, call: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.call = call

    def forward(self, depth: int) -> list[float]:
        before = [self.weight.item()]
        if depth:
            before += self.call(self.other[0], {"weight": self.weight + 1}, (depth - 1,))
        return [*before, self.weight.item()]


@both
def test_mutual_recursion(call: Any) -> None:
    one, two = Half(10.0, call), Half(20.0, call)
    one.other, two.other = [two], [one]
    with unchanged(one), unchanged(two):
        assert call(one, scalar(1.0), (3,)) == [1, 2, 3, 4, 4, 3, 2, 1]
        assert call(two, {}, (2,)) == [20, 21, 22, 22, 21, 20]
    assert (one.weight, two.weight) == (10, 20)


# --- the places from which a call can come ------------------------------------------------------


class Callback(torch.autograd.Function):
    """The identity; calls a function in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return gradients[0], None


def _differentiated(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones((), requires_grad=True)
    torch.autograd.grad(change(x * 1) * 2, x)


def _from_autograd_function(act: Any) -> None:
    _differentiated(lambda x: Callback.apply(x, act))


def _from_tensor_hook(act: Any) -> None:
    def change(x: Tensor) -> Tensor:
        x.register_hook(lambda gradient: act() and None)
        return x

    _differentiated(change)


def _from_forward_hook(act: Any) -> None:
    other = nn.Identity()
    other.register_forward_hook(lambda *_: act() and None)
    other(ONE)


def _from_backward_hook(act: Any) -> None:
    other = nn.Identity()
    other.register_full_backward_hook(lambda *_: act() and None)
    _differentiated(other)


def _from_parametrization(act: Any) -> None:
    class Calls(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            act()
            return weight

    other = nn.Linear(1, 1)
    parametrize.register_parametrization(other, "weight", Calls(), unsafe=True)
    fcall.functional_call(other, {"bias": torch.ones(1)}, torch.ones(1, 1))


def _from_torch_function(act: Any) -> None:
    class Calls(Tensor):
        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any, kwargs: Any = None
        ) -> Any:
            if function is torch.sin:
                act()
            return super().__torch_function__(function, types, args, kwargs or {})

    torch.sin(torch.ones(()).as_subclass(Calls))


def _from_weak_reference(act: Any) -> None:
    thing = nn.Identity()
    reference = weakref.ref(thing, lambda _: act())
    del thing
    assert reference() is None


def _from_garbage_collection(act: Any) -> None:
    def once(phase: str, _: Any) -> None:
        if phase == "start":
            act()

    gc.callbacks.append(once)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(once)


def _from_vmap(act: Any) -> None:
    torch.func.vmap(lambda x: (act(), x)[1])(torch.ones(2))


PLACES = {
    "the backward of an autograd.Function": _from_autograd_function,
    "a tensor hook": _from_tensor_hook,
    "a forward hook": _from_forward_hook,
    "a backward hook": _from_backward_hook,
    "a parametrization": _from_parametrization,
    "__torch_function__": _from_torch_function,
    "a weak reference's callback": _from_weak_reference,
    "garbage collection": _from_garbage_collection,
    "vmap": _from_vmap,
}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


@places
@pytest.mark.parametrize("same", [True, False], ids=["the same module", "another module"])
def test_a_call_from_anywhere_in_a_call(place: Any, same: bool) -> None:
    inner: list[Tensor] = []

    def act() -> None:
        if not inner:  # and not for the call in the call
            inner.append(ONE)
            inner[0] = fcall.functional_call(target, scalar(5.0), ONE)

    module = Scale(lambda: place(act) if not inner else None)
    target = module if same else Scale()
    with unchanged(module), unchanged(target):
        assert fcall.functional_call(module, scalar(3.0), ONE) == 3
    assert inner == [5]


@places
def test_a_failing_call_from_anywhere_in_a_call(place: Any) -> None:
    """The outer call goes on with its values, whatever becomes of the exception."""
    seen: list[str] = []

    class Fails(Scale):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    fails = Fails()

    def act() -> None:
        try:
            fcall.functional_call(fails, scalar(5.0), ONE)
        except ValueError:
            seen.append("failed")

    module = Scale(lambda: place(act))
    with unchanged(module), unchanged(fails):
        assert fcall.functional_call(module, scalar(3.0), ONE) == 3
    assert seen
    assert set(seen) == {"failed"}


@both
def test_a_call_in_a_parametrization_of_the_module_itself(call: Any) -> None:
    """A weight that is made by another network: a hypernetwork."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(2, 2, bias=False)

        def forward(self, weight: Tensor) -> Tensor:
            return call(self.network, {"weight": torch.eye(2) * 3}, (weight,))

    module = nn.Linear(2, 2, bias=False)
    parametrize.register_parametrization(module, "weight", Made(), unsafe=True)
    values = {
        "parametrizations.weight.original": torch.eye(2),
        "parametrizations.weight.0.network.weight": torch.zeros(2, 2),
    }
    with unchanged(module):
        assert torch.equal(call(module, values, (torch.eye(2),)), torch.eye(2) * 3)


def test_state_of_calls_in_calls() -> None:
    """Each dict gets what was reassigned in its own call."""
    module = Counter()
    outer, inner = {"foo": torch.tensor(10.0)}, {"foo": torch.tensor(20.0)}
    seen: list[Any] = []

    def nest(*_: Any) -> None:
        if not seen:
            seen.append("begun")
            seen.append(fcall.functional_call(module, inner, ONE))

    module.register_forward_pre_hook(nest)
    with unchanged(module):
        assert fcall.functional_call(module, outer, ONE) == 12
    assert seen == ["begun", 22]
    assert (outer["foo"], inner["foo"]) == (11, 21)


def test_the_outer_calls_values_in_the_inner_one() -> None:
    """What the inner call has no value for is what stands in the module just then."""
    module = nn.Linear(1, 1)
    inner = []
    module.register_forward_pre_hook(
        lambda *_: inner.append(
            fcall.functional_call(module, {"bias": ONE.view(1)}, ONE.view(1), method="forward")
        )
    )
    given = {"weight": torch.full((1, 1), 7.0), "bias": torch.zeros(1)}
    with unchanged(module):
        assert fcall.functional_call(module, given, ONE.view(1)) == 7
    assert inner == [8]
