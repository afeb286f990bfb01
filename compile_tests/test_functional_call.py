"""What is fcall's own in a call: methods, mappings, values, hooks, modes, meta tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import MLP, Counter, Normed, Tied
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from fcall import errors, functional_call

# --- method= ------------------------------------------------------------------------------------


def test_another_method() -> None:
    module, x = MLP(), torch.randn(2, 3)
    values = state_of(module, seed=1)
    with unchanged(module):
        out = functional_call(module, values, x, method="encode")
    assert_close(out, loaded(module, values).encode(x.double()))


def test_a_submodule_as_method() -> None:
    module, x = MLP(), torch.randn(2, 3)
    values = {"l1.weight": torch.zeros(4, 3)}
    with unchanged(module):
        out = functional_call(module, values, x, method="l1")
    assert torch.equal(out, module.l1.bias.expand(2, 4))


def test_a_method_as_attribute_with_arguments() -> None:
    module = MLP()
    module.affine = lambda x, *, y: module.l1(x) + y
    values = {"l1.weight": torch.zeros(4, 3), "l1.bias": torch.ones(4)}
    out = functional_call(module, values, (torch.randn(2, 3),), {"y": 2}, method="affine")
    assert torch.equal(out, torch.full((2, 4), 3.0))


@pytest.mark.parametrize(
    ("method", "nearest"), [("encod", " (did you mean 'encode'?)"), ("zzz", ""), ("training", None)]
)
def test_no_such_method(method: str, nearest: str | None) -> None:
    module = MLP()
    with unchanged(module), pytest.raises(errors.UnknownMethodError) as caught:
        functional_call(module, {}, torch.randn(2, 3), method=method)
    if nearest is None:
        assert f"MLP has no method '{method}' to call" in str(caught.value)
    else:
        assert str(caught.value) == f"MLP has no method '{method}' to call{nearest}."


def test_hooks_run_for_the_module_alone() -> None:
    module, calls = MLP(), []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    functional_call(module, {}, torch.randn(2, 3))
    assert calls == ["forward"]
    functional_call(module, {}, torch.randn(2, 3), method="forward")
    assert calls == ["forward"]


# --- Mappings -----------------------------------------------------------------------------------


class Frozen(Mapping[str, Tensor]):
    """A mapping that cannot be written."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values_ = values

    def __getitem__(self, key: str) -> Tensor:
        return self.values_[key]

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


WRITABLE = [dict, OrderedDict, UserDict, lambda values: defaultdict(None, values)]
READ_ONLY = [MappingProxyType, Frozen]


@pytest.mark.parametrize("make", [*WRITABLE, *READ_ONLY])
@pytest.mark.parametrize("in_a_list", [False, True])
def test_mappings_of_any_type(make: Any, in_a_list: bool) -> None:
    module, x = MLP(), torch.randn(2, 3)
    values = state_of(module, seed=1)
    weights = [make(values), make({})] if in_a_list else make(values)
    with unchanged(module):
        assert_close(functional_call(module, weights, x), loaded(module, values)(x.double()))


@pytest.mark.parametrize("make", WRITABLE)
@pytest.mark.parametrize("position", [None, 0, 1, 2])
def test_written_back_where_it_came_from(make: Any, position: int | None) -> None:
    module = nn.ModuleDict({"a": Counter(), "b": Counter()})
    module.forward = lambda x: module["a"](x)
    given = make({"a.foo": torch.tensor(5.0)})
    parts = [make({}), {"b.foo": torch.tensor(7.0)}]
    weights = given if position is None else (*parts[:position], given, *parts[position:])
    with unchanged(module):
        assert functional_call(module, weights, torch.zeros(())) == 6
    assert dict(given) == {"a.foo": torch.tensor(6.0)}
    assert [dict(part) for part in parts] == [{}, {"b.foo": torch.tensor(7.0)}]


@pytest.mark.parametrize("make", READ_ONLY)
def test_a_read_only_mapping_cannot_be_written_back(make: Any) -> None:
    module, value = Counter(), torch.tensor(5.0)
    with unchanged(module), pytest.raises(errors.ReadOnlyMappingError) as caught:
        functional_call(module, [make({"foo": value})], torch.zeros(()))
    kind = make.__name__ if make is Frozen else "mappingproxy"
    assert caught.value.details == ("foo", kind)
    assert value == 5


def test_a_read_only_mapping_is_written_in_place() -> None:
    module, x = Normed(), torch.randn(2, 2, 6, 6)
    values = state_of(module, seed=1)
    twin = loaded(module, values)
    with unchanged(module):
        functional_call(module, MappingProxyType(values), x)
    twin(x.double())
    assert_close(values["norm.running_mean"], twin.norm.running_mean)


def test_the_given_dict_is_copied_first() -> None:
    """What the caller's dict becomes during the call plays no part in it."""
    module = Counter()
    given = {"foo": torch.tensor(5.0)}
    module.register_forward_pre_hook(lambda *_: given.clear())
    with unchanged(module):
        assert functional_call(module, given, torch.zeros(())) == 6
    assert given == {}


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, 1.0, [1.0], "one", object(), torch.Size([4])],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["l1.bias", "_orig_mod.l1.bias", "extra"])
def test_not_a_tensor(name: str, value: Any) -> None:
    module = MLP()
    with unchanged(module), pytest.raises(errors.NotATensorError) as caught:
        functional_call(module, {name: value}, torch.randn(2, 3))
    assert caught.value.details == (name, type(value).__name__)


class Logged:
    """Stands for a tensor and keeps the names of the functions that it is given to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.names: list[str] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        for arg in args:
            if isinstance(arg, cls):
                arg.names.append(function.__name__)
        plain = [arg.tensor if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("name", ["weight", "_orig_mod.weight"])
def test_tensor_likes_stand_in(name: str) -> None:
    module, like = nn.Linear(3, 2), Logged(torch.ones(2, 3))
    with unchanged(module):
        out = functional_call(module, {name: like, "bias": torch.zeros(2)}, torch.ones(1, 3))
    assert torch.equal(out, torch.full((1, 2), 3.0))
    assert like.names == ["linear"]


def test_tensor_subclasses_stay_what_they_are() -> None:
    class Marked(Tensor):
        pass

    module = MLP()
    given = {"l2.weight": torch.zeros(2, 4).as_subclass(Marked)}
    assert type(functional_call(module, given, torch.randn(2, 3))) is Marked


# --- Hooks and nesting --------------------------------------------------------------------------


def test_hooks_see_the_given_values() -> None:
    module, seen = MLP(), []
    module.l1.register_forward_pre_hook(lambda m, args: seen.append(m.weight))
    module.l2.register_forward_hook(lambda m, args, out: seen.append(m.bias))
    module.register_forward_hook(lambda m, args, out: seen.append(m.l1.bias))
    values = state_of(module, seed=1)
    with unchanged(module):
        functional_call(module, values, torch.randn(2, 3))
    expected = ["l1.weight", "l2.bias", "l1.bias"]
    assert [id(tensor) for tensor in seen] == [id(values[name]) for name in expected]


class Nesting(nn.Module):
    """Calls its child and itself with other values, on top of those it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(1, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, nested: bool = True) -> Tensor:
        if not nested:
            return self.child(x) * self.gain
        child = functional_call(self.child, {"weight": self.child.weight + 1}, x)
        whole = functional_call(self, {"gain": self.gain * 10}, (x, False))
        return torch.cat([child, whole, self.child(x), self.gain.view(1, 1)])


def test_calls_inside_of_a_call() -> None:
    module = Nesting()
    given = {"child.weight": torch.full((1, 1), 2.0), "gain": torch.tensor(3.0)}
    with unchanged(module):
        out = functional_call(module, given, torch.ones(1, 1))
    assert out.flatten().tolist() == [3, 60, 2, 3]


class NestedCounter(nn.Module):
    """Calls its counter with the counter's own buffer: state goes out through both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        state = {"foo": self.counter.foo}
        out = functional_call(self.counter, state, x)
        self.counter.foo = state["foo"] * 10
        return out


def test_state_comes_out_of_nested_calls() -> None:
    module, given = NestedCounter(), {"counter.foo": torch.tensor(2.0)}
    with unchanged(module):
        assert functional_call(module, given, torch.zeros(())) == 3
    assert given["counter.foo"] == 30


def test_an_exception_in_a_nested_call() -> None:
    module = Nesting()
    module.child.register_forward_pre_hook(lambda *_: 1 / 0)
    with unchanged(module), pytest.raises(ZeroDivisionError):
        functional_call(module, {"gain": torch.tensor(3.0)}, torch.ones(1, 1))


# --- Modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "bfloat16", "float16"],
)
def test_modes_act_as_on_the_module(mode: Any) -> None:
    module, x = MLP(), torch.randn(2, 3)
    values = {name: v.requires_grad_() for name, v in state_of(module, seed=1).items()}
    twin = loaded(module, values).float()
    with mode(), unchanged(module):
        out, expected = functional_call(module, values, x), twin(x)
    assert torch.equal(out, expected)
    facts = ("dtype", "requires_grad")
    assert [getattr(out, f) for f in facts] == [getattr(expected, f) for f in facts]
    assert out.is_inference() == expected.is_inference()


def test_training_and_evaluation() -> None:
    module, x = Normed(), torch.randn(4, 2, 6, 6)
    for training in (True, False):
        module.train(training)
        values = state_of(module, seed=1)
        twin, given = loaded(module, values), dict(values)
        with unchanged(module):
            assert_close(functional_call(module, given, x), twin(x.double()))
        assert_close(given["norm.running_var"], twin.norm.running_var)


# --- Meta tensors -------------------------------------------------------------------------------


def test_meta_tensors_without_a_value() -> None:
    module = MLP().to("meta")
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    values = {"l1.weight": torch.zeros(4, 3), "l2.bias": torch.zeros(2)}
    with unchanged(module), pytest.raises(errors.MetaTensorError) as caught:
        functional_call(module, values, torch.randn(2, 3))
    assert caught.value.details == ("MLP", "given no value", ["l1.bias", "l2.weight"])
    assert calls == []


@pytest.mark.parametrize(
    "given",
    [{}, {"l1.weight": torch.zeros(4, 3, device="meta")}],
    ids=["nothing", "values-on-meta"],
)
def test_all_on_meta(given: dict[str, Tensor]) -> None:
    module = MLP().to("meta")
    with unchanged(module):
        out = functional_call(module, given, torch.randn(5, 3, device="meta"))
    assert out.is_meta
    assert out.shape == (5, 2)


def test_a_real_tensor_deep_in_the_inputs_is_found() -> None:
    module = MLP().to("meta")
    module.forward = lambda inputs: inputs["x"][0]
    with pytest.raises(errors.MetaTensorError):
        functional_call(module, {}, {"x": [torch.zeros(1)]})
    with pytest.raises(errors.MetaTensorError):
        functional_call(module, {}, (), {"inputs": {"x": (torch.zeros(1),)}})


def test_ties_that_were_lost_on_meta() -> None:
    """Moving to meta unties: torch.func computes garbage then, on a mix of meta and real."""
    real, tokens = Tied(), torch.tensor([1, 2])
    base = copy.deepcopy(real).to("meta")
    with pytest.raises(errors.MetaTensorError) as caught:
        functional_call(base, dict(real.named_parameters()), tokens)
    assert caught.value.details == ("Tied", "given no value", ["out.weight"])
    values = {**dict(real.named_parameters()), "out.weight": real.out.weight}
    assert torch.equal(functional_call(base, values, tokens), real(tokens))


def test_functional_call_is_exported() -> None:
    assert fcall.functional_call is functional_call
