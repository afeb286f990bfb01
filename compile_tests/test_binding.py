"""Names to slots: where in the module's tree each name leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compile_tests.support.models import MLP, Plain, Shared, Tied, parametrized
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import both
from fcall import errors, functional_call
from fcall.binding import bind

# --- Every name of every kind of entry ----------------------------------------------------------


class Zoo(nn.Module):
    """Each kind of registered tensor, nested in each kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("passing", torch.rand(2), persistent=False)
        self.register_parameter("nothing", None)
        self.register_buffer("no_buffer", None)
        self.listed = nn.ParameterList([torch.rand(2), torch.rand(2)])
        self.named = nn.ParameterDict({"a": torch.rand(2), "b": torch.rand(2)})
        inner = nn.Module()
        inner.register_buffer("deep", torch.rand(2), persistent=False)
        self.tree = nn.ModuleDict({"x": nn.ModuleList([inner]), "none": None})

    def forward(self) -> dict[str, Tensor]:
        return {
            "weight": self.weight,
            "kept": self.kept,
            "passing": self.passing,
            "listed.0": self.listed[0],
            "listed.1": self.listed[1],
            "named.a": self.named["a"],
            "named.b": self.named["b"],
            "tree.x.0.deep": self.tree["x"][0].deep,
        }


@pytest.mark.parametrize("name", list(Zoo()()))
def test_each_name_leads_to_its_own_tensor(name: str) -> None:
    module, value = Zoo(), torch.zeros(2)
    own = module()
    with unchanged(module):
        found = functional_call(module, {name: value})
    assert {key: id(tensor) for key, tensor in found.items()} == {
        key: id(value) if key == name else id(tensor) for key, tensor in own.items()
    }


def test_all_names_at_once_in_any_order() -> None:
    module = Zoo()
    values = {name: torch.zeros(2) for name in reversed(list(module()))}
    with unchanged(module):
        found = functional_call(module, values, strict=True)
    assert all(found[name] is value for name, value in values.items())


@pytest.mark.parametrize("make", [Zoo, Tied, Shared, parametrized])
def test_strict_takes_the_names_that_torch_lists(make: Any) -> None:
    module = make()
    names = [
        *dict(module.named_parameters(remove_duplicate=False)),
        *dict(module.named_buffers(remove_duplicate=False)),
    ]
    binding = bind(module, names, tie_weights=False, strict=True)
    assert binding.kept == []
    assert {slot.name for slot in binding.slots} <= set(names)


@pytest.mark.parametrize("name", ["nothing", "no_buffer"])
def test_slots_registered_as_none(name: str) -> None:
    module, value = Zoo(), torch.zeros(2)
    module.forward = lambda: getattr(module, name)
    with unchanged(module):
        assert functional_call(module, {name: value}) is value
    assert getattr(module, name) is None


# --- Names that are not registered --------------------------------------------------------------


POSITIONS = [("weight", 0), ("plain", 1), ("scale", 2), ("_stored", 3), ("extra", 4)]


@pytest.mark.parametrize(
    ("kind", "name", "position"),
    [
        *[(Tensor.clone, *position) for position in POSITIONS],
        *[(nn.Parameter, *position) for position in POSITIONS],
        (Tensor.clone, "stored", 3),
    ],
)
def test_plain_attributes(kind: Any, name: str, position: int) -> None:
    module = Plain()
    own: list[float] = [2, 5, 3, 7, -1]
    assert module() == own
    expected = [*own[:position], 11, *own[position + 1 :]]
    with unchanged(module):
        assert functional_call(module, {name: kind(torch.tensor(11.0))}) == expected
    assert module() == own
    assert list(dict(module.named_parameters())) == ["weight"]
    assert not hasattr(module, "extra")
    assert Plain.scale == 3


@pytest.mark.parametrize("name", ["l1.extra", "extra", "l1.weight_extra"])
def test_unexpected_names_are_there_for_the_call_alone(name: str) -> None:
    module, value = MLP(), torch.tensor(1.0)
    seen = []
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    module.l2.register_forward_hook(lambda *_: seen.append(getattr(owner, key)))
    with unchanged(module):
        functional_call(module, {name: value}, torch.randn(2, 3))
    assert seen == [value]
    assert not hasattr(owner, key)


def hiding() -> nn.Module:
    """Return a module that calls one it does not register, as wrappers do."""
    module = nn.Linear(1, 1)
    object.__setattr__(module, "hidden", nn.Linear(1, 1))
    module.forward = lambda x: module.hidden(x)
    return module


@both
def test_a_submodule_that_is_not_registered(call: Any) -> None:
    module = hiding()
    own = module.hidden.weight
    given = {"hidden.weight": torch.ones(1, 1), "hidden.bias": torch.zeros(1)}
    with unchanged(module):
        assert call(module, given, torch.full((1, 1), 3.0)) == 3
    assert module.hidden.weight is own


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@both
def test_a_scripted_submodule(call: Any) -> None:
    module = nn.Sequential(torch.jit.script(nn.Linear(1, 1)), nn.Linear(1, 1))
    given = {"0.weight": torch.full((1, 1), 2.0), "0.bias": torch.ones(1), "1.bias": torch.zeros(1)}
    given["1.weight"] = torch.ones(1, 1)
    own = state_of(module)
    assert call(module, given, torch.full((1, 1), 3.0)) == 7
    assert_close(state_of(module), own)


@pytest.mark.parametrize("name", ["", ".", "l1.", ".weight", "l1..weight", 5, None, ("l1",)])
@pytest.mark.parametrize("strict", [True, False])
def test_keys_that_are_no_names(name: Any, strict: bool) -> None:
    module = MLP()
    with unchanged(module), pytest.raises(errors.InvalidNameError) as caught:
        functional_call(module, {name: torch.ones(1)}, torch.randn(2, 3), strict=strict)
    assert caught.value.details == (name,)


# --- The prefix _orig_mod. -----------------------------------------------------------------------


def test_names_with_the_prefix_of_a_module_that_is_not_compiled() -> None:
    """A state dict saved from the compiled module fits the plain one."""
    module, x = MLP(), torch.randn(2, 3)
    values = state_of(module, seed=1)
    given = {f"_orig_mod.{name}": value for name, value in values.items()}
    with unchanged(module):
        assert_close(
            functional_call(module, given, x, strict=True), loaded(module, values)(x.double())
        )


@pytest.mark.parametrize("same", [True, False])
def test_one_slot_by_both_of_its_names(same: bool) -> None:
    module, value = nn.Linear(1, 1, bias=False), torch.full((1, 1), 2.0)
    given = {"weight": value, "_orig_mod.weight": value if same else value.clone()}
    with unchanged(module):
        if same:
            assert functional_call(module, given, torch.ones(1, 1)) == 2
        else:
            with pytest.raises(errors.TiedValuesError) as caught:
                functional_call(module, given, torch.ones(1, 1))
            assert caught.value.details == (["_orig_mod.weight", "weight"], "Linear")


def test_the_prefix_is_a_part_of_the_path() -> None:
    """A name that only ends like the prefix is a name like any other."""
    module = nn.ModuleDict({"x_orig_mod": nn.Linear(1, 1)})
    with unchanged(module), pytest.raises(errors.StrictKeysError) as caught:
        functional_call(module, {"xweight": torch.ones(1, 1)}, strict=True)
    _, missing, unexpected, _ = caught.value.details
    assert sorted(missing) == ["x_orig_mod.bias", "x_orig_mod.weight"]
    assert unexpected == ["xweight"]


# --- Shared submodules and ties -----------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("path", ["first", "second"])
def test_a_shared_submodule_by_either_path(path: str, tie_weights: bool) -> None:
    module, x = Shared(), torch.randn(2, 3)
    weight = torch.rand(3, 3)
    twin = loaded(module, {"first.weight": weight})
    with unchanged(module):
        out = functional_call(module, {f"{path}.weight": weight}, x, tie_weights=tie_weights)
    assert_close(out, twin(x.double()))


@pytest.mark.parametrize(
    ("tie_weights", "error"), [(True, errors.TiedValuesError), (False, errors.SharedSlotError)]
)
def test_a_shared_submodule_with_two_values(tie_weights: bool, error: Any) -> None:
    module = Shared()
    given = {"second.bias": torch.zeros(3), "first.bias": torch.zeros(3)}
    with unchanged(module), pytest.raises(error) as caught:
        functional_call(module, given, torch.randn(2, 3), tie_weights=tie_weights)
    assert caught.value.details == (["first.bias", "second.bias"], "Shared")


def _without_bias() -> nn.Module:
    module = Shared()
    module.first.bias = None
    return module


def _with_a_parametrized_bias() -> nn.Module:
    module = Shared()
    parametrize.register_parametrization(module.first, "bias", nn.Identity())
    return module


def _with_a_second_path_that_is_not_registered() -> nn.Module:
    module = Shared()
    object.__setattr__(module, "second", module._modules.pop("second"))
    return module


@pytest.mark.parametrize(
    "make", [_without_bias, _with_a_parametrized_bias, _with_a_second_path_that_is_not_registered]
)
def test_slots_by_two_paths_that_named_parameters_does_not_list(make: Any) -> None:
    """torch.func takes the last of the values, without a word."""
    module, x, bias = make(), torch.randn(2, 3), torch.rand(3)
    given = {"first.bias": bias, "second.bias": bias.clone()}
    with unchanged(module), pytest.raises(ValueError, match="multiple values for keys"):
        functional_call(module, given, x)
    given["second.bias"] = bias
    linear = nn.functional.linear
    weight = module.first.weight
    with unchanged(module):
        out = functional_call(module, given, x)
    assert_close(out, linear(linear(x, weight, bias).tanh(), weight, bias))


def test_a_shared_submodule_is_strict_about_slots() -> None:
    module, x = Shared(), torch.randn(2, 3)
    given = {"second.weight": torch.eye(3), "first.bias": torch.zeros(3)}
    for tie_weights in (True, False):
        with unchanged(module):
            out = functional_call(module, given, x, strict=True, tie_weights=tie_weights)
        assert_close(out, x.tanh())


def test_bind_writes_each_slot_once() -> None:
    binding = bind(Shared(), ["second.weight", "first.weight"], tie_weights=True, strict=False)
    assert [slot.name for slot in binding.slots] == ["first.weight"]
    assert binding.homes == [0, 0]
    assert binding.same == [["second.weight", "first.weight"]]
    assert [slot.name for slot in binding.kept] == ["first.bias"]
