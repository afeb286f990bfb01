"""What a module may do in a compiled call and still be one operator, with eager's results."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fcall
from compile_tests.support.compiled import backward, capture, check_compiled, gradients
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Random values for all of ``module``, those for parameters requiring grad."""
    state = state_of(module, seed=1)
    for name, _ in module.named_parameters():
        state[name].requires_grad_()
    return state


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 30 * x**2 * grad  # ten times too much, to be told from autograd's own


def in_place(m: MLP, x: Tensor) -> Tensor:
    x.add_(1)
    return m.encode(x)


def partly_without_gradient(m: MLP, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.l1(x)
    return y + m.l1(x)


def partly_in_bfloat16(m: MLP, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.l1(x)
    return y.float() + m.l1(x)


BODIES: dict[str, Callable[[Any, Tensor], Any]] = {
    "an autograd function": lambda m, x: Cube.apply(m.l1(x)),
    "a nested compiled function": lambda m, x: torch.compile(m.encode, backend="eager")(x),
    "no_grad in part": partly_without_gradient,
    "autocast in part": partly_in_bfloat16,
    "a transform": lambda m, x: torch.func.vmap(m.encode)(x),
    "a gradient": lambda m, x: torch.func.grad(lambda x: m.encode(x).sum())(x),
    "numbers from a tensor": lambda m, x: m.encode(x) * (x > 0).sum().item(),
    "its input written in place": in_place,
    "its input returned": lambda m, x: (x, m.encode(x)),
    "a parameter returned": lambda m, x: (m.l1.weight, m.l1.bias[:2], m.encode(x)),
    "one result twice": lambda m, x: [m.encode(x)] * 2,
    "nothing returned": lambda m, x: None,
    "no tensor returned": lambda m, x: ("text", 1, None, x.shape[0]),
    "constants beside tensors": lambda m, x: {"y": m.encode(x), "n": x.shape[0], "c": 2.5},
    "state read by name": lambda m, x: x @ dict(m.named_parameters())["l1.weight"].mT,
    "state read from a dict": lambda m, x: x @ m.state_dict(keep_vars=True)["l1.weight"].mT,
    "state read from lists": lambda m, x: sum(p.sum() for p in m.parameters()) * x,
    "a new tensor": lambda m, x: m.encode(x) + torch.ones(4, device=x.device),
    "views": lambda m, x: m.encode(x).T.reshape(2, -1).unbind(0),
}


class Does(MLP):
    """Does what it is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        return self.body(self, x)


# Dynamo itself makes an instance of the autograd function.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")
@pytest.mark.parametrize("body", BODIES)
def test_bodies(body: str) -> None:
    def fn(p: dict[str, Tensor], x: Tensor) -> Any:
        return call(module, p, (x,)), x

    module = Does(BODIES[body])
    check_compiled(fn, weights(module), torch.rand(6, 3), module=module)


def test_dropout() -> None:
    module, x = Does(lambda m, x: nn.functional.dropout(m.encode(x), 0.5)), torch.rand(6, 3)
    p = weights(module)
    torch.manual_seed(0)
    expected = call(module, p, x)
    torch.manual_seed(0)
    result = capture(lambda p, x: call(module, p, x), p, x)
    assert result.kinds == ["operator"]
    assert_close(result.out, expected)
    assert 4 < (result.out == 0).sum() < 20


def test_activation_checkpointing() -> None:
    module = Does(lambda m, x: checkpoint(m.encode, x, use_reentrant=False))
    p, x = weights(module), torch.rand(6, 3)
    with unchanged(module):
        result = capture(lambda p, x: call(module, p, x), p, x)
        backward(result.out)
    assert result.kinds == ["operator"]
    twin = loaded(module, p)
    expected = twin(in_float64(x))
    backward(expected)
    assert_close(result.out, expected)
    assert_close(gradients(list(p.values())), gradients(list(twin.parameters())))


def in_checkpoint(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, x: checkpoint(f, p, x, use_reentrant=False)


AROUND: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "checkpointing": in_checkpoint,
    "torch.cond": lambda f: (
        lambda p, x: torch.cond(x.sum() > 0, lambda x: f(p, x), lambda x: f(p, x) * 2, (x,))
    ),
    "a nested compiled function": lambda f: torch.compile(f, backend="eager"),
    "a comprehension": lambda f: lambda p, x: [f(p, x) for _ in range(1)],
}


@pytest.mark.parametrize("around", AROUND)
def test_what_a_call_may_stand_in(around: str) -> None:
    def fn(p: dict[str, Tensor], x: Tensor) -> Any:
        return AROUND[around](lambda p, x: call(module, p, x))(p, x)

    module = MLP()
    twice = around == "torch.cond"
    route = ["operator"] * 2 if twice else "operator"
    check_compiled(fn, weights(module), torch.rand(6, 3), module=module, route=route)


def of_owner(m: MLP) -> Callable[..., Any]:
    class Owner:
        model = m

    return lambda p, x: call(Owner.model, p, x)


PLACES: dict[str, Callable[[MLP], Callable[..., Any]]] = {
    "a list": lambda m: (lambda ms: lambda p, x: call(ms[0], p, x))([m]),
    "a dict": lambda m: (lambda ms: lambda p, x: call(ms["m"], p, x))({"m": m}),
    "a ModuleDict": lambda m: (lambda ms: lambda p, x: call(ms["m"], p, x))(
        nn.ModuleDict({"m": m})
    ),
    "an attribute": of_owner,
    "a default argument": lambda m: lambda p, x, m=m: call(m, p, x),
    "a partial": lambda m: partial(call, m),
    "a submodule": lambda m: (lambda ms: lambda p, x: call(ms[1][0], p, x))(
        nn.Sequential(nn.Tanh(), nn.ModuleList([m]))
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_the_module_comes_from(place: str) -> None:
    module = MLP()
    check_compiled(PLACES[place](module), weights(module), torch.rand(6, 3), module=module)


DICTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "OrderedDict": OrderedDict,
    "defaultdict": lambda p: defaultdict(torch.Tensor, p),
    "MappingProxyType": MappingProxyType,
    "named_parameters": lambda p: dict(p.items()),
    "Parameters": lambda p: {n: nn.Parameter(v.detach()) for n, v in p.items()},
    "expanded": lambda p: {n: v[:1].expand_as(v) for n, v in p.items()},
}


@pytest.mark.parametrize("kind", DICTS)
def test_kinds_of_mappings_and_values(kind: str) -> None:
    module, x = MLP(), torch.rand(6, 3)
    p = DICTS[kind](weights(module))
    result = capture(lambda p, x: call(module, p, x), p, x)
    assert result.kinds == ["operator"]
    assert_close(result.out, call(module, p, x))


def test_weights_from_the_closure() -> None:
    module = MLP()
    p = weights(module)
    check_compiled(lambda x: call(module, p, x), torch.rand(6, 3), module=module)


class Methods(MLP):
    def of_the_class(self, x: Tensor) -> Tensor:
        return self.l1(x)

    @property
    def found(self) -> Callable[[Tensor], Tensor]:
        return self.l1

    builtin = torch.tanh

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 2

    def __getattr__(self, name: str) -> Any:
        return self.encode if name == "made_up" else super().__getattr__(name)


@pytest.mark.parametrize(
    "method",
    [
        "of_the_class",
        "of_the_instance",
        "l2",  # a submodule
        "found",
        "made_up",
        "static",
        "builtin",
        "__call__",
    ],
)
def test_methods(method: str) -> None:
    module = Methods()
    x = torch.rand(6, 4) if method == "l2" else torch.rand(6, 3)
    module.of_the_instance = lambda x: module.encode(x) + 1  # type: ignore[assignment]
    p = weights(module)
    check_compiled(lambda p, x: call(module, p, x, method=method), p, x, module=module)


def test_a_method_of_a_compiled_module() -> None:
    module = torch.compile(MLP(), backend="aot_eager")
    p = weights(module)
    check_compiled(lambda p, x: call(module, p, x, method="encode"), p, torch.rand(6, 3))


def replace_submodule(m: MLP) -> None:
    m.l1 = m.other


def replace_parameter(m: MLP) -> None:
    m.l1.weight = m.other.weight


def tie(m: MLP) -> None:
    m.other.weight = m.l1.weight


def set_attribute(m: MLP) -> None:
    m.power = 3


def evaluate(m: MLP) -> None:
    m.eval()


class Changed(MLP):
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = (self.encode(x) + self.other(x)) ** self.power
        return y * 2 if self.training else y


@pytest.mark.parametrize(
    "change", [replace_submodule, replace_parameter, tie, set_attribute, evaluate]
)
def test_a_change_of_the_module_in_the_trace(change: Callable[[nn.Module], None]) -> None:
    def fn(module: nn.Module) -> Callable[..., Any]:
        def run(p: dict[str, Tensor], x: Tensor) -> Any:
            before = call(module, p, x)
            change(module)
            return before, call(module, p, x)

        return run

    module = Changed()
    twin = copy.deepcopy(module)
    p, x = {"l1.weight": torch.rand(4, 3)}, torch.rand(2, 3)
    before, after = fn(twin)(p, x)
    assert not torch.allclose(before, after)
    result = capture(fn(module), p, x)
    assert_close(result.out, (before, after))
    assert_close(dict(module.named_parameters()), dict(twin.named_parameters()))
    assert_close(call(module, p, x), call(twin, p, x))
