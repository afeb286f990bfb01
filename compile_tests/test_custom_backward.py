"""Custom autograd functions in eager calls: a backward that reads the module it was called in."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.oracle import assert_close, loaded, unchanged
from fcall.eager.custom_backward import follow_custom_functions


class _Keeps(torch.autograd.Function):
    """``x -> module.weight * x``; what it keeps of the module, subclasses say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Any) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight = ctx.kept() if not isinstance(ctx.kept, nn.Module) else ctx.kept.weight
        (x,) = ctx.saved_tensors
        return grad * weight, grad * x, None


class _KeepsInSetup(_Keeps):
    """The same with ``setup_context``, for transforms."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, kept: Any) -> Tensor:
        return x * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kept = inputs[2]
        ctx.save_for_backward(inputs[0])


class Scale(nn.Module):
    """Multiplies by its weight, which backward reads where ``kept`` says."""

    def __init__(self, kept: str = "module", function: Any = _Keeps) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.kept = kept
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        kept = {"module": self, "function": lambda: self.weight, "method": self.read}[self.kept]
        return self.function.apply(x.sin(), self.weight, kept)  # type: ignore[no-any-return]

    def read(self) -> Tensor:
        return self.weight


class Forces(nn.Module):
    """Backward in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kept", ["module", "function", "method"])
@pytest.mark.parametrize("function", [_Keeps, _KeepsInSetup])
def test_backward_sees_the_values_of_the_call(kept: str, function: Any) -> None:
    module = nn.Sequential(Scale(kept, function), Scale(kept, function))
    values = {"0.weight": leaf(2.0), "1.weight": leaf(0.5)}
    x, twin_x = leaf(0.3), leaf(0.3)
    twin = loaded(module, values)
    twin(twin_x).backward()
    with unchanged(module):
        fcall.functional_call(module, values, (x,)).backward()
    assert_close(x.grad, twin_x.grad)
    assert_close([v.grad for v in values.values()], [p.grad for p in twin.parameters()])


def test_torch_func_sees_the_modules_own() -> None:
    """Should this fail, torch has caught up."""
    x = leaf(0.3)
    torch.func.functional_call(Scale(), {"weight": leaf(2.0)}, (x,)).backward()
    assert_close(x.grad, 3.0 * x.detach().cos())


def test_a_module_that_is_kept_elsewhere_is_seen_as_it_is() -> None:
    """Documented: nothing on ``ctx`` tells that backward reads a module. Should be 2, is 3."""
    module, x = Scale(), leaf(0.3)

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            return grad * module.weight, None

    module.forward = lambda x: Reads.apply(x, module.weight)  # type: ignore[method-assign]
    fcall.functional_call(module, {"weight": leaf(2.0)}, (x,)).backward()
    assert_close(x.grad, torch.tensor(3.0, dtype=torch.float64))


def test_double_backward_and_forces() -> None:
    module, x, twin_x, weight = Forces(), leaf(0.3), leaf(0.3), leaf(2.0)
    twin = loaded(module, {"energy.weight": weight})
    twin(twin_x).backward()
    with unchanged(module):
        fcall.functional_call(module, {"energy.weight": weight}, (x,)).backward()
    assert_close([x.grad, weight.grad], [twin_x.grad, twin.energy.weight.grad])


def test_backward_in_another_call() -> None:
    module, x, weight = Scale(), leaf(0.3), leaf(2.0)
    with unchanged(module):
        out = fcall.functional_call(module, {"weight": weight}, (x,))
        with fcall.substitute(module, {"weight": leaf(7.0)}):
            out.backward()
    assert_close(x.grad, 2.0 * x.detach().cos())


def test_transforms() -> None:
    module = Scale(function=_KeepsInSetup)
    weight, x = leaf(2.0).detach(), leaf(0.3).detach()
    with unchanged(module):
        grads = torch.func.grad(
            lambda p, x: fcall.functional_call(module, {"weight": p}, (x,)), argnums=(0, 1)
        )(weight, x)
    assert_close(grads, (x.sin(), 2.0 * x.cos()))


def test_an_error_in_backward() -> None:
    class Fails(_Keeps):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            raise OverflowError(ctx.kept.weight.item())

    module, x = Scale(function=Fails), leaf(0.3)
    with unchanged(module):
        out = fcall.functional_call(module, {"weight": leaf(2.0)}, (x,))
        with pytest.raises(OverflowError, match=r"2\.0"):
            out.backward()


def test_nodes_that_keep_nothing_are_left_alone() -> None:
    class Plain(_Keeps):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            return grad * ctx.kept, None, None

    x = leaf(0.3)

    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Plain.apply(x, self.weight, 0.5)  # type: ignore[no-any-return]

    out = fcall.functional_call(Halves(1, 1), {"weight": leaf(2.0)}, (x,))
    assert set(vars(out.grad_fn)) == {"kept"}


class Stores(Scale):
    """Keeps its last output in a buffer: the node of its function is reached from there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("make", [Scale, Stores])
def test_nothing_is_kept_alive(make: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        module, x, weight = make(), leaf(0.3), leaf(2.0)
        reference = weakref.ref(weight)
        state = {"weight": weight, "last": torch.zeros((), dtype=torch.float64)}
        with unchanged(module):
            fcall.functional_call(module, state, (x,)).backward()
        del state, weight
        assert reference() is None
    finally:
        gc.enable()


def test_torch_is_wrapped_once() -> None:
    node = torch.autograd.function.BackwardCFunction
    init = node.__init__
    follow_custom_functions()
    assert node.__init__ is init
