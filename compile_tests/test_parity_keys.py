"""Keys on torch.func and on fcall: strict, unexpected, special and tied ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import TORCH, both


class Knot(nn.Module):
    """``() -> ()``: a tied parameter and a tied buffer. Its own values are 10, 20 and 30."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.scale = nn.Parameter(torch.tensor(10.0))
        self.part.bias = nn.Parameter(torch.tensor(20.0))
        self.twin_bias = self.part.bias
        self.register_buffer("shift", torch.tensor(30.0))
        self.register_buffer("twin_shift", self.shift)
        self.rate = 0.5

    def forward(self) -> list[float]:
        tensors = (self.part.scale, self.part.bias, self.twin_bias, self.shift, self.twin_shift)
        return [tensor.item() if tensor is not None else None for tensor in tensors]


ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)
OWN = [10, 20, 20, 30, 30]


@both
@pytest.mark.parametrize(
    ("given", "tied", "untied"),
    [
        pytest.param({}, OWN, OWN, id="nothing"),
        pytest.param({"part.scale": ONE}, [1, 20, 20, 30, 30], [1, 20, 20, 30, 30], id="no-tie"),
        pytest.param(
            {"part.bias": ONE}, [10, 1, 1, 30, 30], [10, 1, 20, 30, 30], id="by-first-name"
        ),
        pytest.param(
            {"twin_bias": ONE}, [10, 1, 1, 30, 30], [10, 20, 1, 30, 30], id="by-second-name"
        ),
        pytest.param(
            {"twin_shift": ONE}, [10, 20, 20, 1, 1], [10, 20, 20, 30, 1], id="buffer-by-second-name"
        ),
        pytest.param(
            {"part.bias": ONE, "twin_bias": ONE},
            [10, 1, 1, 30, 30],
            [10, 1, 1, 30, 30],
            id="one-value-twice",
        ),
        pytest.param(
            {"part.bias": ONE, "twin_bias": TWO}, None, [10, 1, 2, 30, 30], id="two-values"
        ),
        pytest.param(
            {"part.bias": ONE, "twin_bias": ONE.clone()},
            None,
            [10, 1, 1, 30, 30],
            id="two-equal-tensors",
        ),
        pytest.param(
            {"twin_shift": ONE, "shift": TWO, "part.scale": ONE},
            None,
            [1, 20, 20, 2, 1],
            id="two-values-of-a-buffer",
        ),
    ],
)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_ties(
    call: Any, tie_weights: bool, given: dict[str, Tensor], tied: Any, untied: Any
) -> None:
    module, before = Knot(), dict(given)
    expected = tied if tie_weights else untied
    with unchanged(module):
        if expected is None:
            names = sorted(name for name in given if name != "part.scale")
            message = f"functional_call got multiple values for keys {names}, which are tied"
            with pytest.raises(ValueError, match=re.escape(message)):
                call(module, given, tie_weights=tie_weights)
        else:
            assert call(module, given, tie_weights=tie_weights) == expected
    assert given == before


class Triple(nn.Module):
    """One parameter under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = self.c = nn.Parameter(torch.tensor(10.0))

    def forward(self) -> list[float]:
        return [self.a.item(), self.b.item(), self.c.item()]


@both
@pytest.mark.parametrize("names", ["a", "b", "c", "ab", "bc", "ac", "abc"])
def test_three_ties(call: Any, names: str) -> None:
    module = Triple()
    with unchanged(module):
        if call is TORCH and len(names) == 2:  # torch looks up a value for the third, too
            with pytest.raises(KeyError):
                call(module, dict.fromkeys(names, ONE))
        else:
            assert call(module, dict.fromkeys(names, ONE)) == [1, 1, 1]


@both
def test_three_ties_in_conflict(call: Any) -> None:
    module = Triple()
    message = re.escape("multiple values for keys ['a', 'b', 'c'], which are tied")
    with unchanged(module), pytest.raises(ValueError, match=message):
        call(module, {"c": ONE, "a": ONE, "b": TWO})


ALL = ["part.scale", "part.bias", "twin_bias", "shift", "twin_shift"]


@both
@pytest.mark.parametrize(
    ("names", "tie_weights", "unexpected", "missing"),
    [
        pytest.param(ALL, True, "", "", id="all"),
        pytest.param(ALL, False, "", "", id="all-untied"),
        pytest.param(["part.scale", "part.bias", "shift"], True, "", "", id="one-of-each-tie"),
        pytest.param(["part.scale", "twin_bias", "twin_shift"], True, "", "", id="other-of-each"),
        pytest.param(
            ["part.scale", "part.bias", "shift"],
            False,
            "",
            "'twin_bias', 'twin_shift'",
            id="one-of-each-untied",
        ),
        pytest.param(["part.scale", "shift"], True, "", "'part.bias', 'twin_bias'", id="missing"),
        pytest.param(
            [], True, "", "'part.bias', 'part.scale', 'shift', 'twin_bias', 'twin_shift'", id="none"
        ),
        pytest.param([*ALL, "zz"], True, "'zz'", "", id="unexpected"),
        pytest.param(
            ["part.scale", "shift", "zz"],
            True,
            "'zz'",
            "'part.bias', 'twin_bias'",
            id="both-errors",
        ),
        pytest.param(
            ["part.scale", "part.bias", "shift", "zz"],
            False,
            "'zz'",
            "'twin_bias', 'twin_shift'",
            id="both-errors-untied",
        ),
        pytest.param([*ALL, "rate"], True, "'rate'", "", id="attribute"),
        pytest.param([*ALL, "qq.zz"], True, "'qq.zz'", "", id="no-submodule"),
    ],
)
def test_strict(
    call: Any, names: list[str], tie_weights: bool, unexpected: str, missing: str
) -> None:
    module = Knot()
    given = dict.fromkeys(names, ONE)
    message = ["Error(s) in reparametrizing for Knot:"]
    if unexpected:
        message.append(f"Unexpected key(s): {unexpected}.")
    if missing:
        message.append(f"Missing key(s): {missing}.")
    with unchanged(module):
        if unexpected or missing:
            with pytest.raises(RuntimeError) as caught:
                call(module, given, tie_weights=tie_weights, strict=True)
            assert str(caught.value) == "\n\t".join(message)
        else:
            assert call(module, given, tie_weights=tie_weights, strict=True) == [1] * 5


class NeedsExtra(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.extra


@both
def test_a_name_that_the_module_lacks(call: Any) -> None:
    module = NeedsExtra()
    with unchanged(module):
        assert call(module, {"extra": ONE}, TWO) == 3
        with pytest.raises(RuntimeError, match=re.escape("Unexpected key(s): 'extra'.")):
            call(module, {"extra": ONE}, TWO, strict=True)
        for strict in (True, False):
            with pytest.raises(
                AttributeError, match="'NeedsExtra' object has no attribute 'extra'"
            ):
                call(module, {}, TWO, strict=strict)
    assert not hasattr(module, "extra")


class NotATensor:
    pass


@both
@pytest.mark.parametrize(
    ("given", "error"),
    [
        pytest.param({"part.scale": NotATensor()}, TypeError, id="object-for-a-parameter"),
        pytest.param({"shift": 1.0}, TypeError, id="number-for-a-buffer"),
        pytest.param({"zz": [ONE]}, TypeError, id="list-for-what-is-not-there"),
        pytest.param({"rate": ONE}, TypeError, id="attribute-that-is-no-tensor"),
        pytest.param({"part": ONE}, (TypeError, KeyError), id="submodule"),
        pytest.param({"training": ONE}, TypeError, id="flag"),
        pytest.param({"forward": ONE}, TypeError, id="method"),
        pytest.param({"zz.bias": ONE}, AttributeError, id="no-submodule"),
        pytest.param({"part.zz.bias": ONE}, AttributeError, id="no-submodule-deeper"),
        pytest.param({"part.scale.zz": ONE}, TypeError, id="path-through-a-tensor"),
        pytest.param({"rate.zz": ONE}, TypeError, id="path-through-a-number"),
        pytest.param({"": ONE}, KeyError, id="empty"),
    ],
)
def test_special_keys_and_values(call: Any, given: dict[str, Any], error: Any) -> None:
    module = Knot()
    with unchanged(module), pytest.raises(error):
        call(module, {"shift": TWO, **given})


@both
def test_none_as_a_value(call: Any) -> None:
    """torch takes None for "no tensor"; fcall refuses it as it does whatever is no tensor."""
    module = Knot()
    with unchanged(module):
        if call is TORCH:
            assert call(module, {"part.bias": None}) == [10, None, None, 30, 30]
        else:
            with pytest.raises(TypeError, match="not a tensor but a NoneType"):
                call(module, {"part.bias": None})


@both
def test_a_bias_that_is_switched_off(call: Any) -> None:
    module = nn.Linear(2, 2, bias=False)
    given = {"bias": torch.full((2,), 5.0), "weight": torch.zeros(2, 2)}
    with unchanged(module):
        assert torch.equal(call(module, given, torch.ones(1, 2)), torch.full((1, 2), 5.0))
        with pytest.raises(RuntimeError, match=re.escape("Unexpected key(s): 'bias'")):
            call(module, given, torch.ones(1, 2), strict=True)
    assert module.bias is None
