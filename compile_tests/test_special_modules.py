"""Modules that are special: wrapped, compiled, exported, quantised, or copying themselves."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import TORCH, both
from fcall import errors, functional_call

# --- children that are no plain modules ---------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_compiled_child(prefix: str) -> None:
    torch._dynamo.reset()
    inner, x = nn.Linear(3, 3), torch.rand(2, 3)
    module = nn.Sequential(torch.compile(inner, backend="aot_eager"), nn.Tanh())
    module(x)  # compiled with its own weights
    values = state_of(inner, seed=1)
    given = {f"0.{prefix}{name}": value.requires_grad_() for name, value in values.items()}
    twin = loaded(inner, values)
    with unchanged(module):
        for _ in range(2):
            out = functional_call(module, given, x)
    assert_close(out, twin(x.double()).tanh())
    ours = torch.autograd.grad(out.sum(), list(given.values()))
    theirs = torch.autograd.grad(twin(x.double()).tanh().sum(), list(twin.parameters()))
    assert_close(list(ours), list(theirs))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_scripted_child(how: str) -> None:
    inner, x = nn.Linear(3, 3), torch.rand(2, 3)
    child = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, x)
    module = nn.Sequential(child, nn.Tanh())
    values = state_of(inner, seed=1)
    before = [p.detach().clone() for p in inner.parameters()]
    out = functional_call(module, {f"0.{name}": v for name, v in values.items()}, x)
    assert_close(out, loaded(inner, values)(x.double()).tanh())
    assert_close([p.detach() for p in child.parameters()], before)


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.compiled
@pytest.mark.parametrize("make", [_normed, MLP])
def test_an_exported_module(make: Any) -> None:
    plain, x = make(), torch.rand(2, 3)
    module = torch.export.export(plain, (x,)).module()
    values = state_of(module, seed=1)
    twin = loaded(plain, values)
    with unchanged(module):
        out = functional_call(module, values, x, strict=True)
    assert_close(out, twin(x.double()))
    assert_close({n: values[n] for n, _ in twin.named_buffers()}, dict(twin.named_buffers()))


def test_a_traced_graph() -> None:
    plain, x = MLP(), torch.rand(2, 3)
    module = torch.fx.symbolic_trace(plain)
    values = state_of(module, seed=1)
    with unchanged(module):
        out = functional_call(module, values, x, strict=True)
    assert_close(out, loaded(plain, values)(x.double()))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("0.weight", "method"), ("0.bias", "method"), ("0.scale", "float")],
)
def test_a_quantised_module(name: str, kind: str) -> None:
    """Its weights are packed: they are no tensors that could be given."""
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})
    x = torch.rand(2, 3)
    assert torch.equal(functional_call(module, {}, x), module(x))
    with pytest.raises(
        errors.NotATensorSlotError, match=f"{name!r} .* is not a tensor but a {kind}"
    ):
        functional_call(module, {name: torch.rand(3, 3)}, x)


# --- modules that use themselves in forward -----------------------------------------------------


class Copies(nn.Linear):
    """Returns copies of itself, made in different ways while it is called."""

    def forward(self, how: str) -> Any:  # type: ignore[override]
        if how == "deepcopy":
            return copy.deepcopy(self)
        if how == "pickle":
            return pickle.loads(pickle.dumps(self))
        file = io.BytesIO()
        torch.save(self.state_dict() if how == "state_dict" else self, file)
        file.seek(0)
        saved = torch.load(file, weights_only=how == "state_dict")
        if how == "module":
            return saved
        twin = Copies(1, 1, bias=False)
        twin.load_state_dict(saved)
        return twin


@both
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "module"])
@pytest.mark.parametrize("kind", [nn.Parameter, lambda value: value], ids=["Parameter", "Tensor"])
def test_a_copy_made_in_the_call_has_the_given_values(call: Any, how: str, kind: Any) -> None:
    module, value = Copies(1, 1, bias=False), kind(torch.full((1, 1), 4.0))
    with unchanged(module):
        twin = call(module, {"weight": value}, (how,))
    assert type(twin) is Copies
    assert twin.weight == 4
    assert twin.weight is not value
    x = torch.ones(1, 1)
    assert nn.Linear.forward(twin, x) == 4
    assert functional_call(twin, {"weight": x * 5}, "deepcopy").weight == 5
    assert torch.equal(nn.Linear.forward(module, x), module.weight)


class Loads(nn.Module):
    """Loads a state_dict into itself, in place or by assignment."""

    def __init__(self, assign: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        self.load_state_dict({"weight": torch.tensor(7.0)}, assign=self.assign)
        return x * self.weight


@both
@pytest.mark.parametrize("assign", [False, True])
def test_loading_in_the_call(call: Any, assign: bool) -> None:
    module, value = Loads(assign), nn.Parameter(torch.tensor(5.0))
    given = {"weight": value}
    with unchanged(module):
        assert call(module, given, (torch.ones(()),)) == 7
    assert given["weight"] == 7
    assert (given["weight"] is value) != assign


class Registers(nn.Module):
    """Registers its parameter anew, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.last = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        del self.weight
        self.register_parameter("weight", nn.Parameter(torch.tensor(7.0)))
        return x * self.weight


def test_a_parameter_registered_anew_in_the_call() -> None:
    """torch.func puts the module's own back at the end: an optimizer counts by the order."""
    module, theirs = Registers(), Registers()
    given = {"weight": torch.tensor(5.0)}
    with unchanged(module):
        assert functional_call(module, given, torch.ones(())) == 7
    assert given["weight"] == 7
    TORCH(theirs, {"weight": torch.tensor(5.0)}, (torch.ones(()),))
    assert list(theirs._parameters) == ["last", "weight"], "torch has caught up"


class Watches(nn.Module):
    """Has a weak reference to its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.reference = weakref.ref(self.weight)

    def forward(self) -> tuple[Any, Tensor]:
        return self.reference(), self.weight


@both
def test_weak_references_to_parameters(call: Any) -> None:
    """They are to the module's own tensor, which lives on during the call."""
    module, value = Watches(), torch.tensor(5.0)
    referred, weight = call(module, {"weight": value}, ())
    assert referred is module.weight
    assert weight is value


class Views(nn.Module):
    """Two parameters in one memory."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(6.0)
        self.first = nn.Parameter(flat[:4])
        self.second = nn.Parameter(flat[2:])

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.add_(1)
        return (self.first - self.second) * x


@both
def test_parameters_that_are_views_of_one_another(call: Any) -> None:
    """A value takes the place of one name; the other is a tensor of its own."""
    module, value = Views(), torch.full((4,), 10.0)
    with unchanged(module):
        assert call(module, {"first": value}, (1.0,)).tolist() == [9, 8, 7, 6]
    assert value.tolist() == [11] * 4
    flat = torch.zeros(6)
    given = {"first": flat[:4], "second": flat[2:]}
    with unchanged(module):
        assert call(module, given, (1.0,)).tolist() == [0, 0, 1, 1]
    assert flat.tolist() == [1, 1, 1, 1, 0, 0]
