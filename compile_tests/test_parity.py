"""What torch.func.functional_call documents and its own tests pin, on torch.func and on fcall.

Where the two differ on purpose, the test branches on ``call is TORCH`` and says why.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.models import Affine, Counter
from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import both


def identity() -> dict[str, Tensor]:
    """Values with which Affine returns its input."""
    return {
        "layer.weight": torch.ones(1, 1),
        "layer.bias": torch.zeros(1),
        "shift": torch.zeros(1),
    }


X = torch.tensor([[3.0]])


# --- Arguments --------------------------------------------------------------------------------


class Echo(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


@both
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, ((), {}), id="omitted"),
        pytest.param({"args": None}, ((), {}), id="None"),
        pytest.param({"args": 5}, ((5,), {}), id="single-value"),
        pytest.param({"args": [1, 2]}, (([1, 2],), {}), id="list-is-single-value"),
        pytest.param({"args": (1, 2)}, ((1, 2), {}), id="tuple"),
        pytest.param({"args": ((1, 2),)}, (((1, 2),), {}), id="tuple-of-tuple"),
        pytest.param({"kwargs": {"a": 1}}, ((), {"a": 1}), id="kwargs-alone"),
        pytest.param({"args": (), "kwargs": {"a": 1}}, ((), {"a": 1}), id="empty-tuple"),
        pytest.param({"args": 5, "kwargs": {"a": 1}}, ((5,), {"a": 1}), id="both"),
        pytest.param({"args": 5, "kwargs": None}, ((5,), {}), id="kwargs-None"),
        pytest.param(
            {"args": 5, "kwargs": MappingProxyType({"a": 1})}, ((5,), {"a": 1}), id="mapping"
        ),
        pytest.param({"args": torch.Size([1, 2])}, ((1, 2), {}), id="a-kind-of-tuple"),
    ],
)
def test_arguments(call: Any, given: dict[str, Any], expected: Any) -> None:
    assert call(Echo(), {}, **given) == expected


@both
def test_arguments_can_be_positional(call: Any) -> None:
    assert call(Echo(), {}, (1,), {"a": 2}) == ((1,), {"a": 2})


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.ones(2)

    def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
        return x * self.gain + other


@both
def test_missing_keyword_argument(call: Any) -> None:
    module, values = KeywordOnly(), {"gain": torch.zeros(2)}
    x, other = torch.rand(2), torch.rand(2)
    with unchanged(module):
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'other'"):
            call(module, values, x)
        for out in (
            call(module, values, x, {"other": other}),
            call(module, values, (), {"x": x, "other": other}),
            call(module, values, kwargs={"x": x, "other": other}),
        ):
            assert torch.equal(out, other)


# --- Dicts ------------------------------------------------------------------------------------


def _in_parts(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value} for name, value in values.items()]


@both
@pytest.mark.parametrize(
    "dicts",
    [
        pytest.param(identity, id="dict"),
        pytest.param(lambda: (identity(),), id="tuple-of-one"),
        pytest.param(lambda: [identity()], id="list-of-one"),
        pytest.param(lambda: tuple(_in_parts(identity())), id="tuple-of-three"),
        pytest.param(lambda: _in_parts(identity()), id="list-of-three"),
        pytest.param(lambda: [{}, identity(), {}], id="with-empty-ones"),
    ],
)
def test_given_values_replace_the_modules_own(call: Any, dicts: Any) -> None:
    module = Affine()
    with unchanged(module):
        assert torch.equal(call(module, dicts(), X), X)


@both
@pytest.mark.parametrize("dicts", [{}, (), [], ({},)], ids=repr)
def test_nothing_given(call: Any, dicts: Any) -> None:
    module = Affine()
    with unchanged(module):
        assert torch.equal(call(module, dicts, X), module(X))


@both
@pytest.mark.parametrize(
    ("dicts", "message"),
    [
        pytest.param(
            ({"shift": torch.zeros(1)}, {"shift": torch.zeros(1)}),
            r"'shift'\]? appeared in multiple dictionaries",
            id="duplicate",
        ),
        pytest.param(None, "parameter_and_buffer_dicts", id="None"),
        pytest.param(3, "parameter_and_buffer_dicts", id="number"),
        pytest.param({"shift"}, "parameter_and_buffer_dicts", id="set"),
        pytest.param(iter([{}]), "parameter_and_buffer_dicts", id="iterator"),
        pytest.param(({}, None), "parameter_and_buffer_dicts", id="sequence-with-None"),
        pytest.param([("shift", X)], "parameter_and_buffer_dicts", id="items"),
        pytest.param("shift", "parameter_and_buffer_dicts", id="string"),
    ],
)
def test_wrong_dicts(call: Any, dicts: Any, message: str) -> None:
    module = Affine()
    with unchanged(module), pytest.raises(ValueError, match=message):
        call(module, dicts, X)


@both
@pytest.mark.parametrize("extra", [{}, {"extra": torch.ones(1)}, {"layer.extra": torch.ones(1)}])
def test_what_is_left_out_stays(call: Any, extra: dict[str, Tensor]) -> None:
    module = Affine()
    with unchanged(module):
        out = call(module, {"layer.weight": torch.full((1, 1), 2.0), **extra}, X)
    torch.testing.assert_close(out, X * 2 + module.layer.bias + module.shift)


# --- The examples of torch's documentation ------------------------------------------------------


@both
def test_documented_reassigned_buffer(call: Any) -> None:
    given = {"foo": torch.zeros(())}
    module = Counter()
    with unchanged(module):
        assert call(module, given, torch.ones(())) == 2
    assert module.foo == 0
    assert given["foo"] == 1


class FooTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Parameter(torch.ones(()))
        self.foo_tied = self.foo

    def forward(self, x: Tensor) -> Tensor:
        return x + self.foo + self.foo_tied


@both
@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        pytest.param(["foo"], {}, 0, id="tied"),
        pytest.param(["foo"], {"tie_weights": False}, 1, id="untied"),
        pytest.param(["foo", "foo_tied"], {}, 0, id="both"),
    ],
)
def test_documented_ties(call: Any, names: list[str], options: Any, expected: int) -> None:
    module = FooTied()
    assert module(torch.zeros(())) == 2
    with unchanged(module):
        given = dict.fromkeys(names, torch.zeros(()))
        assert call(module, given, torch.zeros(()), **options) == expected


class Bar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 1))
        self.register_buffer("buffer", torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.buffer


@both
def test_documented_multiple_dicts(call: Any) -> None:
    module = Bar()
    with unchanged(module):
        out = call(module, ({"weight": torch.ones(1, 1)}, {"buffer": torch.zeros(1)}), X)
    assert torch.equal(out, X)


@both
def test_documented_grad(call: Any) -> None:
    model, x, t = nn.Linear(3, 3), torch.randn(4, 3), torch.randn(4, 3)

    def loss(params: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return nn.functional.mse_loss(call(model, params, x), t)

    with unchanged(model):
        grads = torch.func.grad(loss)(dict(model.named_parameters()), x, t)
        detached = {name: p.detach() for name, p in model.named_parameters()}
        untracked = torch.func.grad(loss)(detached, x, t)
    expected = torch.autograd.grad(nn.functional.mse_loss(model(x), t), list(model.parameters()))
    torch.testing.assert_close(list(grads.values()), list(expected))
    torch.testing.assert_close(list(untracked.values()), list(expected))
    assert grads["weight"].grad_fn is not None
    assert untracked["weight"].grad_fn is None


# --- Gradients ----------------------------------------------------------------------------------


@both
def test_gradients_go_to_the_given_values(call: Any) -> None:
    module, values = Affine(), identity()
    x = X.clone().requires_grad_()
    root = torch.ones(1, 1, requires_grad=True)
    values["layer.weight"] = root * 2  # not a leaf
    values["layer.bias"].requires_grad_()
    with unchanged(module):
        call(module, values, x).sum().backward()
    assert root.grad == 2 * X
    assert values["layer.bias"].grad == 1
    assert x.grad == 2
    assert values["shift"].grad is None
    assert [p.grad for p in module.parameters()] == [None, None]
    assert module.shift.grad is None


@both
def test_gradients_go_to_the_modules_own_where_nothing_is_given(call: Any) -> None:
    module = Affine()
    call(module, {"layer.weight": torch.ones(1, 1)}, X).sum().backward()
    assert module.layer.weight.grad is None
    assert module.layer.bias.grad == 1
