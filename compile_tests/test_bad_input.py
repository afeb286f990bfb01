"""Wrong dicts and wrong names: which exception each raises, what it says, and what it changes."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.bad_calls import ALL, BIAS, Bad, X, check
from compile_tests.support.models import MLP, Counter, parametrized
from compile_tests.support.oracle import unchanged
from fcall import errors


class Odd(nn.Module):
    """Has attributes that are not tensors, and a property without a setter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.rate = 0.5
        self.nothing = None
        self.items = [nn.Linear(3, 3)]
        self.register_module("gone", None)

    @property
    def twice(self) -> Tensor:
        return self.inner.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _no_dicts(dicts: Any, got: str) -> Bad:
    message = "must be a dict from names to tensors, or a list or tuple of such dicts, but got "
    return Bad(dicts, errors.InvalidDictsError, [message + got + "."])


def _no_name(name: Any) -> Bad:
    clauses = [f"{name!r} is not the name of a parameter or buffer", "parts joined by single dots"]
    return Bad({name: BIAS}, errors.InvalidNameError, clauses)


def _no_path(name: str, part: str, kind: str, module: Any = MLP) -> Bad:
    clauses = [f"the key {name!r} leads through {part!r}", f"is no submodule but a {kind}."]
    return Bad({name: BIAS}, errors.PathThroughValueError, clauses, module)


def _no_slot(name: str, kind: str, module: Any = MLP) -> Bad:
    clauses = [f"the attribute {name!r} of {module.__name__} is not a tensor but a {kind}."]
    return Bad({name: BIAS}, errors.NotATensorSlotError, clauses, module)


CASES: dict[str, Bad] = {
    # The dicts.
    "an int": _no_dicts(3, "int"),
    "None": _no_dicts(None, "NoneType"),
    "a string": _no_dicts("l1.bias", "str"),
    "bytes": _no_dicts(b"l1.bias", "bytes"),
    "a set": _no_dicts({"l1.bias"}, "set"),
    "a generator": _no_dicts((part for part in [ALL]), "generator"),
    "items": _no_dicts(ALL.items(), "dict_items"),
    "pairs": _no_dicts(list(ALL.items()), "a sequence with a tuple"),
    "a tensor": _no_dicts(BIAS, "Tensor"),
    "a module": _no_dicts(MLP(), "MLP"),
    "a list with None": _no_dicts([ALL, None], "a sequence with a NoneType"),
    "a list with a string": _no_dicts([ALL, "l1"], "a sequence with a str"),
    "a list in a list": _no_dicts([[ALL]], "a sequence with a list"),
    "a list 10,000 deep": _no_dicts(_nested(ALL, 10_000), "a sequence with a list"),
    "a name in two dicts": Bad(
        [{}, {"l1.bias": BIAS}, {"l1.bias": BIAS}],
        errors.DuplicateNameError,
        ["the key 'l1.bias' appeared in multiple dictionaries", "Keep it in one of them."],
    ),
    "a read-only mapping": Bad(
        types.MappingProxyType({"foo": torch.zeros(())}),
        errors.ReadOnlyMappingError,
        ["the module changes 'foo'", "(mappingproxy) is read-only", "Pass a dict"],
        Counter,
    ),
    # Names.
    "name: an int": _no_name(1),
    "name: None": _no_name(None),
    "name: NaN": _no_name(float("nan")),
    "name: True": _no_name(True),
    "name: bytes": _no_name(b"l1.bias"),
    "name: a tuple": _no_name(("l1", "bias")),
    "name: empty": _no_name(""),
    "name: a dot": _no_name("."),
    "name: a dot at the end": _no_name("l1."),
    "name: a dot at the start": _no_name(".bias"),
    "name: two dots": _no_name("l1..bias"),
    "no such submodule": Bad(
        {"l3.bias": BIAS},
        errors.UnknownPathError,
        ["MLP has no submodule to which the key 'l3.bias' leads", "did you mean 'l2.bias'?"],
    ),
    "3,000 parts": Bad(
        {".".join(["l1"] * 3000): BIAS}, errors.UnknownPathError, ["MLP has no submodule"]
    ),
    "through a parameter": _no_path("l1.weight.x", "weight", "Parameter"),
    "through a method": _no_path("forward.x", "forward", "method"),
    "through the dict": _no_path("l1._parameters.bias", "_parameters", "dict"),
    "through a float": _no_path("rate.x", "rate", "float", Odd),
    "through None": _no_path("nothing.x", "nothing", "NoneType", Odd),
    "through a list": _no_path("items.0.bias", "items", "list", Odd),
    "through no submodule": _no_path("gone.x", "gone", "NoneType", Odd),
    "through a parametrized weight": _no_path(
        "0.weight.original", "weight", "Tensor", parametrized
    ),
    "a submodule": _no_slot("l1", "Linear"),
    "a method": _no_slot("forward", "method"),
    "a flag": _no_slot("training", "bool"),
    "the dict of parameters": _no_slot("_parameters", "dict"),
    "the class": _no_slot("__class__", "type"),
    "a float": _no_slot("rate", "float", Odd),
    "a property": Bad(
        {"twice": BIAS},
        errors.ReadOnlyAttributeError,
        ["can't set 'twice': it is a property of Odd without a setter"],
        Odd,
    ),
    "strict, a typo": Bad(
        {**ALL, "l1.bais": BIAS},
        errors.StrictKeysError,
        ["Unexpected key(s): 'l1.bais' (did you mean 'l1.bias'?)."],
        options={"strict": True},
    ),
    "strict, missing": Bad(
        {"l1.bias": BIAS},
        errors.StrictKeysError,
        ["for MLP", "Missing key(s): 'l1.weight', 'l2.bias', 'l2.weight'."],
        options={"strict": True},
    ),
    "strict, with the compiled name too": Bad(
        {**ALL, "_orig_mod.l1.bias": BIAS},
        errors.TiedValuesError,
        ["['_orig_mod.l1.bias', 'l1.bias']", "the same tensor for each"],
        options={"strict": True},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_wrong_call(case: Bad) -> None:
    check(case)


# --- what is not wrong --------------------------------------------------------------------------


def test_a_name_that_is_not_there_changes_nothing() -> None:
    """As in torch.func: without strict, the misspelt name is an attribute for the call."""
    module = MLP()
    with unchanged(module):
        out = fcall.functional_call(module, {"l1.bais": BIAS}, X)
    assert torch.equal(out, module(X))


def test_a_dict_that_is_cleared_during_the_call() -> None:
    module, given = MLP(), {"l1.bias": BIAS}
    expected = fcall.functional_call(module, dict(given), X)
    module.register_forward_pre_hook(lambda *_: given.clear())
    with unchanged(module):
        assert torch.equal(fcall.functional_call(module, given, X), expected)
    assert given == {}


def test_a_dict_that_grows_during_the_call() -> None:
    """What comes late is not given."""
    module, given = Counter(), {"foo": torch.ones(())}
    module.register_forward_pre_hook(lambda *_: given.update(more=torch.zeros(())))
    with unchanged(module):
        assert fcall.functional_call(module, given, torch.zeros(())) == 2
    assert given == {"foo": torch.tensor(2.0), "more": torch.tensor(0.0)}


def test_a_dict_without_the_name_when_it_is_to_be_written_back() -> None:
    """A key that was taken out during the call stays out."""
    module, given = Counter(), {"foo": torch.ones(())}
    module.register_forward_pre_hook(lambda *_: given.clear())
    with unchanged(module):
        fcall.functional_call(module, given, torch.zeros(()))
    assert given == {}
