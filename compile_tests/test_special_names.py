"""Tensors that are found in other ways than nn.Module's own: slots, wrappers, own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from compile_tests.support.compiled import capture
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import TORCH, both
from fcall import errors, functional_call


class Slotted(nn.Module):
    """Keeps a tensor in a slot of the class."""

    __slots__ = ("empty", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale + 1
        return x * self.scale


@both
def test_a_tensor_in_slots(call: Any) -> None:
    module, given = Slotted(), {"scale": torch.tensor(5.0)}
    own = module.scale
    with unchanged(module):
        assert call(module, given, (torch.ones(()),)) == 6
    assert module.scale is own
    assert given["scale"] == 6


def test_a_slot_that_is_empty() -> None:
    module = Slotted()
    with unchanged(module):
        functional_call(module, {"empty": torch.tensor(5.0)}, torch.ones(()))
    assert not hasattr(module, "empty")


class Hidden(nn.Module):
    """Wraps a module, and acts as if it was the wrapped one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Renamed(Hidden):
    """Gives its parameters the names that they have in the wrapped module."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace("inner.", ""), parameter


WRAPPERS = {
    "__getattr__": Hidden,
    "named_parameters": Renamed,
    "torch's for checkpoints": checkpoint_wrapper,
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@wrappers
@pytest.mark.parametrize("inner", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))], ids=repr)
def test_names_of_a_module_that_hides_itself(wrap: Any, inner: nn.Module) -> None:
    module, x = wrap(inner), torch.rand(2, 3)
    values = state_of(inner, seed=1)
    expected = loaded(inner, values)(x.double())
    with unchanged(module):
        assert_close(functional_call(module, values, x), expected)
        whole = state_of(module, seed=1)
        assert_close(functional_call(module, whole, x, strict=True), expected)


@pytest.mark.parametrize("wrap", [Renamed, checkpoint_wrapper])
def test_names_of_its_own_are_expected_ones(wrap: Any) -> None:
    module = wrap(nn.Linear(3, 3))
    names = [name for name, _ in module.named_parameters()]
    assert names == ["weight", "bias"]
    with pytest.raises(errors.StrictKeysError, match=r"Missing key\(s\): '[\w.]*\.bias'.$"):
        functional_call(module, {"weight": torch.rand(3, 3)}, torch.rand(2, 3), strict=True)


def test_torch_cannot_call_a_module_that_hides_itself() -> None:
    """Should this fail, torch has caught up."""
    module = Renamed(nn.Linear(3, 3))
    with pytest.raises(KeyError, match="already exists"):
        TORCH(module, state_of(module), (torch.rand(2, 3),))


@pytest.mark.compiled
@wrappers
def test_a_module_that_hides_itself_in_a_compiled_call(wrap: Any) -> None:
    inner, x = nn.Linear(3, 3), torch.rand(2, 3)
    module, values = wrap(inner), state_of(inner, seed=1)
    with unchanged(module):
        result = capture(lambda p, x: functional_call(module, p, x), values, x)
    assert_close(result.out, loaded(inner, values)(x.double()))


class Listed(nn.Module):
    """Says that it has no parameters, and writes a state_dict of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"other": 3}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_parameter_that_the_module_does_not_list() -> None:
    module = Listed()
    with unchanged(module):
        assert functional_call(module, {"weight": torch.tensor(5.0)}, torch.ones(())) == 5


def test_the_method_of_a_module_that_hides_itself() -> None:
    module = Hidden(MLP())
    values = {f"inner.{name}": value for name, value in state_of(MLP(), seed=1).items()}
    x = torch.rand(2, 3)
    with unchanged(module):
        out = functional_call(module, values, x, method="encode")
    expected = torch.tanh(x @ values["inner.l1.weight"].T + values["inner.l1.bias"])
    assert_close(out, expected)
