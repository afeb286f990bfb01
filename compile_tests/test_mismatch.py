"""The notes on an error of a call whose values have other shapes, or are on other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import MLP, Tied
from compile_tests.support.oracle import unchanged
from fcall.mismatch import explain_mismatch


def notes(module: nn.Module, given: dict[str, Any], error: BaseException | None = None) -> Any:
    """Return what is said on an error of a call with ``given``."""
    error = error or RuntimeError("shapes")
    with unchanged(module):
        explain_mismatch(module, list(given), list(given.values()), error)
    return said_of(error)


def said_of(error: BaseException) -> list[str]:
    """Return the notes; without them, in Python 3.10, what was added to the message."""
    return getattr(error, "__notes__", []) or str(error.args[0]).split("\n")[1:]


def test_each_name_with_both_shapes() -> None:
    given = {"l1.weight": torch.rand(4, 5), "l1.bias": torch.rand(4), "l2.bias": torch.rand(())}
    assert notes(MLP(), given) == [
        "functional_call gave MLP values of other shapes than its own, which it may not support: "
        "'l1.weight' is (4, 5), its own is (4, 3); 'l2.bias' is (), its own is (2,)."
    ]


def test_buffers() -> None:
    (note,) = notes(nn.BatchNorm1d(3), {"running_mean": torch.rand(4)})
    assert "'running_mean' is (4,), its own is (3,)" in note


@pytest.mark.parametrize(
    "given",
    [{}, {"l1.bias": torch.rand(4)}, {"unknown": torch.rand(4)}, {"l1.bias": 3.0}],
    ids=["nothing", "its own shape", "an unknown name", "no tensor"],
)
def test_nothing_is_said_where_shapes_are_not_the_reason(given: dict[str, Any]) -> None:
    assert notes(MLP(), given) == []


def devices_note(module: nn.Module, given: dict[str, Any]) -> list[str]:
    """Return what is said on torch's error about devices; "meta" is the only other one here."""
    return notes(module, given, RuntimeError("Expected all tensors to be on the same device"))


def test_tensors_on_several_devices() -> None:
    given = {"l1.weight": torch.rand(4, 3), "l1.bias": torch.rand(4, device="meta")}
    assert devices_note(MLP(), given) == [
        "functional_call ran MLP with parameters and buffers on several devices: "
        "on meta 'l1.bias'; on cpu 'l1.weight', 'l2.weight', 'l2.bias'. "
        "Move the values given to one with .to(device)."
    ]


def test_a_tied_name_that_is_replaced_counts_no_more() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2, bias=False, device="meta") for _ in range(2)])
    module[1].weight = module[0].weight
    assert devices_note(module, {"1.weight": torch.rand(2, 2)}) == []


def test_many_names_on_one_device_are_cut() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    (note,) = devices_note(module, {"0.bias": torch.rand(2, device="meta")})
    assert "on meta '0.bias'; on cpu '0.weight', '1.weight'" in note
    assert "'4.weight', and 3 more." in note


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"l1.bias": torch.rand(4)}, "the same device"),
        ({"l1.bias": torch.rand(4, device="meta")}, "something else"),
        ({"l1.bias": 3.0}, "the same device"),
        ({"unknown": torch.rand((), device="meta")}, "the same device"),
    ],
    ids=["one device", "another error", "no tensor", "no dimensions"],
)
def test_nothing_is_said_where_devices_are_not_the_reason(
    given: dict[str, Any], error: str
) -> None:
    assert notes(MLP(), given, RuntimeError(error)) == []


def test_a_lazy_parameter_has_no_shape() -> None:
    error = RuntimeError("shapes")
    explain_mismatch(nn.LazyLinear(2), ["weight"], [torch.rand(2, 3)], error)
    assert said_of(error) == []


def test_the_names_of_a_compiled_module() -> None:
    compiled: Any = torch.compile(MLP())
    for name in ("l1.bias", "_orig_mod.l1.bias"):
        assert len(notes(compiled, {name: torch.rand(5)})) == 1


def test_tied_names() -> None:
    (note,) = notes(Tied(), {"out.weight": torch.rand(3, 3)})
    assert "'out.weight' is (3, 3), its own is (7, 4)" in note


def test_a_long_list_is_cut() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    (note,) = notes(module, {name: torch.rand(9) for name, _ in module.named_parameters()})
    assert "'3.bias'" in note
    assert "'4.weight'" not in note
    assert note.endswith("; and 4 more.")


def test_once_for_nested_calls() -> None:
    error, given = RuntimeError("shapes"), {"l1.bias": torch.rand(5)}
    notes(MLP(), given, error)
    assert len(notes(MLP(), given, error)) == 1


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_the_error_of_a_call(error: type[Exception]) -> None:
    """It stays the same exception."""
    raised = error("of the module")

    class Raises(MLP):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            raise raised

    with pytest.raises(error) as caught:
        fcall.functional_call(Raises(), {"l1.bias": torch.rand(5)}, torch.rand(2, 3))
    assert caught.value is raised
    assert any("'l1.bias' is (5,)" in note for note in said_of(raised))
