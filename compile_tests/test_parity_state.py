"""State that the module changes in the call, and calls that fail, on torch.func and on fcall."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import TORCH, both


class Changing(nn.Module):
    """Has a parameter, a buffer and a tensor attribute, all 10, and runs what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0), requires_grad=False)
        self.register_buffer("buffer", torch.tensor(10.0))
        self.plain = torch.tensor(10.0)

    def forward(self, change: Callable[[Changing], Any]) -> Any:
        return change(self)


SLOTS = ["weight", "buffer", "plain", "extra"]


@both
@pytest.mark.parametrize("name", SLOTS)
def test_in_place(call: Any, name: str) -> None:
    module, value = Changing(), torch.tensor(1.0)
    given = {name: value}
    with unchanged(module):
        out = call(module, given, lambda m: getattr(m, name).add_(1) * 3)
    assert out == 6
    assert given[name] is value
    assert value == 2


def _reassign(name: str) -> Callable[[Changing], Tensor]:
    def change(module: Changing) -> Tensor:
        new = getattr(module, name) + 1
        setattr(module, name, nn.Parameter(new) if name == "weight" else new)
        return getattr(module, name) * 3

    return change


@both
@pytest.mark.parametrize("name", SLOTS)
def test_reassigned(call: Any, name: str) -> None:
    module, value = Changing(), torch.tensor(1.0)
    given = {name: value}
    with unchanged(module):
        assert call(module, given, _reassign(name)) == 6
    assert given[name] is not value
    assert given[name] == 2
    assert value == 1


@both
def test_reassigned_in_one_of_several_dicts(call: Any) -> None:
    module = Changing()
    parts = [{"weight": torch.tensor(1.0)}, {"buffer": torch.tensor(1.0)}]
    with unchanged(module):
        call(module, parts, _reassign("buffer"))
    # torch writes into a dict that it merged the parts into, and nobody sees.
    assert parts[1]["buffer"] == (1 if call is TORCH else 2)
    assert parts[0] == {"weight": torch.tensor(1.0)}


@both
def test_reassigned_under_the_other_name_of_a_tie(call: Any) -> None:
    module = Changing()
    module.register_buffer("twin", module.buffer)
    given = {"buffer": torch.tensor(1.0)}
    with unchanged(module):
        call(module, given, _reassign("twin"))
    assert given == {"buffer": torch.tensor(1.0)}  # no name was given for what changed


@both
@pytest.mark.parametrize("name", ["weight", "buffer", "plain"])
def test_only_what_was_given_is_protected(call: Any, name: str) -> None:
    module, given = Changing(), {"extra": torch.zeros(())}
    call(module, given, _reassign(name))
    assert getattr(module, name) == 11
    assert list(given) == ["extra"]


@both
@pytest.mark.parametrize("name", ["weight", "buffer", "plain"])
def test_deleted(call: Any, name: str) -> None:
    module, value = Changing(), torch.tensor(1.0)
    given = {name: value}
    call(module, given, lambda m: delattr(m, name))
    assert getattr(module, name) == 10
    # torch puts a marker of its own, which is no tensor, into the caller's dict.
    assert (given[name] is value) == (call is not TORCH)


@both
@pytest.mark.parametrize("name", ["weight", "buffer"])
def test_deleted_and_put_back_in_its_place(call: Any, name: str) -> None:
    module = Changing()
    module.bias = nn.Parameter(torch.tensor(10.0))
    module.register_buffer("other", torch.tensor(10.0))
    before = list(module.state_dict())
    call(module, {name: torch.tensor(1.0)}, lambda m: delattr(m, name))
    # torch appends it: parameters come in another order, and an optimizer's state is mixed up.
    assert (list(module.state_dict()) == before) == (call is not TORCH)


@both
@pytest.mark.parametrize("name", ["plain", "extra"])
def test_reassigned_as_a_parameter(call: Any, name: str) -> None:
    module, given = Changing(), {name: torch.tensor(1.0)}

    def change(module: Changing) -> Tensor:
        setattr(module, name, nn.Parameter(torch.tensor(2.0)))
        return getattr(module, name) * 3

    if call is TORCH and name == "plain":  # stays registered
        call(module, given, change)
        assert list(dict(module.named_parameters())) == ["weight", "plain"]
    else:
        with unchanged(module):
            assert call(module, given, change) == 6
    assert given[name] == 2


@both
@pytest.mark.parametrize("name", ["plain", "extra"])
def test_a_parameter_given_for_a_plain_attribute(call: Any, name: str) -> None:
    module = Changing()
    given = {name: nn.Parameter(torch.tensor(1.0))}
    if call is TORCH and name == "plain":  # stays registered, with a value that is no Parameter
        call(module, given, lambda m: None)
        assert list(dict(module.named_parameters())) == ["weight", "plain"]
    else:
        with unchanged(module):
            assert call(module, given, lambda m: getattr(m, name) * 3) == 3


class Oops(Exception):
    """Raised by a module."""


@both
@pytest.mark.parametrize("error", [Oops, KeyError, StopIteration, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", SLOTS)
def test_an_exception_in_the_module(call: Any, name: str, error: type[BaseException]) -> None:
    module, raised = Changing(), error("from the module")
    given = {name: torch.tensor(1.0)}

    def change(module: Changing) -> None:
        _reassign(name)(module)
        raise raised

    with unchanged(module), pytest.raises(error) as caught:
        call(module, given, change)
    assert caught.value is raised
    assert given[name] == 2  # what was changed before is written back, too


class Guarded(nn.Module):
    """One of its tensors is a property that cannot be assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(10.0))

    @property
    def guarded(self) -> Tensor:
        return self.weight * 2

    def forward(self) -> Tensor:
        return self.weight


@both
def test_a_value_that_cannot_be_set(call: Any) -> None:
    module = Guarded()
    names = ["weight", "guarded", "bias"]  # so one is set before
    with unchanged(module), pytest.raises(AttributeError, match=r"no setter|can't set"):
        call(module, {name: torch.tensor(1.0) for name in names})


@both
def test_running_statistics(call: Any) -> None:
    module, x = nn.BatchNorm1d(10), torch.full((20, 10), 128.0)
    given = {"running_mean": torch.zeros(10), "num_batches_tracked": torch.tensor(4)}
    own_mean, own_variance = module.running_mean.clone(), module.running_var.clone()
    call(module, given, x)
    torch.testing.assert_close(given["running_mean"], torch.full((10,), 12.8))
    assert given["num_batches_tracked"] == 5
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_mean, own_mean)
    assert not torch.equal(module.running_var, own_variance)  # nothing was given for it
    call(module, {}, x)
    torch.testing.assert_close(module.running_mean, torch.full((10,), 12.8))


@both
@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda cell: cell.__name__)
def test_rnns(call: Any, cell: Any) -> None:
    module, other = cell(2, 3, batch_first=True), cell(2, 3, batch_first=True)
    x = torch.randn(1, 4, 2)
    given = {name: p.detach().clone() for name, p in other.named_parameters()}
    own = list(module._flat_weights)
    out = call(module, given, x)
    torch.testing.assert_close(out, other(x))
    # torch leaves the given weights in the lists in which the module keeps its own a second time.
    for weights in (module._flat_weights, [ref() for ref in module._flat_weight_refs]):
        assert all(a is b for a, b in zip(own, weights)) == (call is not TORCH)


class Twice(nn.Module):
    """One submodule by two paths; returns what it holds, by each path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = self.first

    def forward(self) -> list[float]:
        return [self.first.weight.item(), self.second.weight.item()]


@both
@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_a_submodule_by_two_paths(call: Any, names: list[str]) -> None:
    module, value = Twice(), torch.ones(1, 1)
    own = module.first.weight
    assert call(module, {f"{name}.weight": value for name in names}) == [1, 1]
    # torch swaps the value in twice and takes it for the module's own the second time.
    assert (module.first.weight is own) == (call is not TORCH)
