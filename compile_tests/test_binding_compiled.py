"""Names of a module that torch.compile wraps: with the prefix ``_orig_mod.`` or without."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compile_tests.support.models import MLP, Plain, Symmetric
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from fcall import functional_call

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_of_a_compiled_module(prefix: str) -> None:
    module, x = MLP(), torch.randn(2, 3)
    compiled = torch.compile(module, backend="eager")
    values = state_of(module, seed=1)
    given = {prefix + name: value for name, value in values.items()}
    with unchanged(compiled):
        out = functional_call(compiled, given, x, strict=True)
    assert_close(out, loaded(module, values)(x.double()))


@pytest.mark.parametrize("names", [["0.weight"], ["0._orig_mod.weight"], ["_orig_mod.0.weight"]])
def test_a_compiled_submodule(names: list[str]) -> None:
    module = nn.Sequential(torch.compile(nn.Linear(3, 2, bias=False), backend="eager"))
    given = {name: torch.zeros(2, 3) for name in names}
    with unchanged(module):
        assert functional_call(module, given, torch.randn(1, 3)).eq(0).all()


@pytest.mark.parametrize("name", ["bias", "_orig_mod.bias"])
def test_a_slot_registered_as_none_in_a_compiled_module(name: str) -> None:
    module = torch.compile(nn.Linear(2, 2, bias=False), backend="eager")
    given = {name: torch.full((2,), 5.0)}
    with unchanged(module):
        out = functional_call(module, given, torch.zeros(1, 2))
    assert torch.equal(out, torch.full((1, 2), 5.0))


@pytest.mark.parametrize("name", ["weight", "_orig_mod.weight"])
def test_a_parametrization_in_a_compiled_module(name: str) -> None:
    inner = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(inner, "weight", Symmetric())
    module = torch.compile(inner, backend="eager")
    weight = torch.arange(9.0).view(3, 3)
    with unchanged(module):
        out = functional_call(module, {name: weight}, torch.eye(3))
    assert torch.equal(out, weight.mT)


@pytest.mark.parametrize("name", ["plain", "scale", "stored", "extra"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_plain_attributes_of_a_compiled_module(prefix: str, name: str) -> None:
    inner = Plain()
    own = inner()
    module = torch.compile(inner, backend="eager", dynamic=False)
    inner.forward = lambda: getattr(inner, name)
    value = torch.tensor(11.0)
    with unchanged(module):
        assert functional_call(module, {prefix + name: value}) is value
    del inner.forward
    assert inner() == own
