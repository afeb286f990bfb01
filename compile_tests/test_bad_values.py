"""Wrong values, modules and arguments: which exception each raises, and what it changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests import test_bad_input
from compile_tests.support.bad_calls import ALL, BIAS, Bad, X, check
from compile_tests.support.models import MLP, Shared, Tied
from compile_tests.test_bad_input import Odd
from fcall import errors

rand = torch.rand


class Three(nn.Module):
    """One weight under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def _no_tensor(value: Any, kind: str) -> Bad:
    clauses = [f"the value given for 'l1.bias' is not a tensor but a {kind}.", "leave a name out"]
    return Bad({"l1.bias": value}, errors.NotATensorError, clauses)


def _no_module(module: Any, kind: str) -> Bad:
    message = f"functional_call calls an nn.Module, but got a {kind}."
    return Bad(ALL, errors.NotAModuleError, [message], lambda: module)


def _jitted(make: Any) -> Bad:
    clauses = ["the Jitted module", "call the module it was scripted from"]
    return Bad({}, errors.UnsupportedModuleError, clauses, make)


def _by_torch(name: str, value: Tensor, clause: str, module: Any = MLP, x: Any = X) -> Bad:
    return Bad({name: value}, RuntimeError, [clause], module, (x,))


def _norm() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked = None  # which it counts before it fails
    return norm


def _meta(device: str) -> Any:
    return lambda: MLP().to(device)


CASES: dict[str, Bad] = {
    # Values.
    "value: None": _no_tensor(None, "NoneType"),
    "value: a float": _no_tensor(1.0, "float"),
    "value: NaN": _no_tensor(float("nan"), "float"),
    "value: a list": _no_tensor([1.0, 2.0], "list"),
    "value: a string": _no_tensor("0", "str"),
    "value: a tuple": _no_tensor((BIAS,), "tuple"),
    "value: an array": _no_tensor(np.zeros(4), "ndarray"),
    "value: a module": _no_tensor(nn.Linear(3, 4), "Linear"),
    "value: a dict": _no_tensor({"bias": BIAS}, "dict"),
    "value: a class": _no_tensor(Tensor, "_TensorMeta"),
    "two values for a tie": Bad(
        {"embed.weight": rand(7, 4), "out.weight": rand(7, 4)},
        errors.TiedValuesError,
        ["['embed.weight', 'out.weight'], which are tied in Tied", "tie_weights=False"],
        Tied,
        (torch.arange(3),),
    ),
    "three values for a tie": Bad(
        {f"{name}.weight": rand(3, 3) for name in "cab"},
        errors.TiedValuesError,
        ["['a.weight', 'b.weight', 'c.weight'], which are tied in Three"],
        Three,
    ),
    "two values for three names": Bad(
        {f"{name}.weight": rand(3, 3) for name in "ca"},
        errors.TiedValuesError,
        ["['a.weight', 'c.weight'], which are tied in Three"],
        Three,
    ),
    "two values for one slot": Bad(
        {"first.bias": rand(3), "second.bias": rand(3)},
        errors.SharedSlotError,
        ["['first.bias', 'second.bias']", "tie_weights=False cannot untie them"],
        Shared,
        options={"tie_weights": False},
    ),
    "a part of a module on meta": Bad(
        {"l1.weight": rand(4, 3)},
        errors.MetaTensorError,
        ["MLP has tensors on the meta device", "['l1.bias', 'l2.bias', 'l2.weight']"],
        _meta("meta"),
    ),
    "a lazy parameter": Bad(
        {"weight": rand(2, 3)},
        errors.LazyModuleError,
        ["LazyLinear has lazy modules whose parameters are not made yet: ['weight']"],
        lambda: nn.LazyLinear(2),
    ),
    "a lazy buffer": Bad(
        {"running_mean": rand(3)},
        errors.LazyModuleError,
        ["LazyBatchNorm1d", "['running_mean']", "Call the module once as it is"],
        nn.LazyBatchNorm1d,
    ),
    "an uninitialized value": Bad(
        {"l1.bias": nn.parameter.UninitializedParameter()},
        ValueError,
        ["Attempted to use an uninitialized parameter"],
    ),
    # Values that torch's operations refuse.
    "another shape": _by_torch("l1.weight", rand(4, 5), "mat1 and mat2 shapes cannot"),
    "another shape of a bias": _by_torch("l1.bias", rand(5), "must match the existing size (5)"),
    "a scalar": _by_torch("l1.weight", torch.tensor(1.0), "at least 1D"),
    "nothing in it": _by_torch("l1.weight", torch.empty(0), "mat2 must be a matrix"),
    "another dtype": _by_torch("l1.weight", rand(4, 3).double(), "Float and Double"),
    "integers": _by_torch("l1.weight", torch.ones(4, 3).long(), "Float and Long"),
    "a bias on meta": Bad({"l1.bias": BIAS.to("meta")}, errors.MetaTensorError, ["['l1.bias']"]),
    "sparse": _by_torch("l1.bias", BIAS.to_sparse(), "unsupported for Sparse tensors"),
    "another shape of a buffer": _by_torch(
        "running_mean", rand(4), "running_mean should contain 3 elements not 4", _norm
    ),
    "a parameter for a buffer": _by_torch(
        "running_var", rand(3).requires_grad_(), "cannot have requires_grad True", _norm
    ),
    "a small embedding": Bad(
        {"embed.weight": rand(2, 4)}, IndexError, ["index out of range"], Tied, (torch.tensor(5),)
    ),
    "another dtype of an RNN": Bad(
        {"weight_ih_l0": rand(16, 3).double()},
        ValueError,
        ["(torch.float32) does not match weight dtype (torch.float64)"],
        lambda: nn.LSTM(3, 4),
    ),
    # What is called, and with what.
    "module: a function": _no_module(len, "builtin_function_or_method"),
    "module: a class": _no_module(nn.Linear, "type"),
    "module: None": _no_module(None, "NoneType"),
    "module: the dict": _no_module(ALL, "dict"),
    "module: a method": _no_module(MLP().forward, "method"),
    "module: a compiled call": _no_module(fcall.compile(MLP()), "CompiledCall"),
    "module: scripted": _jitted(lambda: torch.jit.script(nn.Linear(3, 3))),
    "module: traced": _jitted(lambda: torch.jit.trace(nn.Linear(3, 3), X)),
    "module: DataParallel": Bad(
        {}, errors.UnsupportedModuleError, ["nn.DataParallel"], lambda: nn.DataParallel(MLP())
    ),
    "module: without forward": Bad(
        {}, NotImplementedError, ['missing the required "forward"'], lambda: nn.ModuleList([MLP()])
    ),
    "no such method": Bad(
        ALL,
        errors.UnknownMethodError,
        ["MLP has no method 'encod' to call (did you mean 'encode'?)"],
        options={"method": "encod"},
    ),
    "a method that is a number": Bad(
        {}, errors.UnknownMethodError, ["no method 'rate'"], Odd, options={"method": "rate"}
    ),
    "no argument": Bad(ALL, TypeError, ["missing 1 required positional argument: 'x'"], args=()),
    "too many arguments": Bad(ALL, TypeError, ["takes 2 positional"], args=((X, X, X),)),
    "an unknown keyword": Bad(ALL, TypeError, ["'nope'"], args=(X, {"nope": 1})),
    "an argument twice": Bad(ALL, TypeError, ["multiple values for"], args=(X, {"x": X})),
    "keywords that are no strings": Bad(ALL, TypeError, ["must be strings"], args=(X, {1: X})),
    "keywords that are no dict": Bad(ALL, TypeError, ["not iterable"], args=(X, 3)),
    "an unknown option": Bad(ALL, TypeError, ["'stric'"], options={"stric": True}),
    "options by position": Bad(ALL, TypeError, ["positional"], args=(X, None, True)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*sparse:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_wrong_call(case: Bad) -> None:
    check(case)


def test_there_are_many_cases() -> None:
    assert len(CASES) + len(test_bad_input.CASES) >= 60


@pytest.mark.parametrize("name", ["l1.weight", "l2.weight"])
def test_a_value_on_meta_in_a_call_with_real_ones(name: str) -> None:
    """torch computes numbers with it, of whatever is in memory."""
    value = ALL[name].to("meta")
    assert not torch.func.functional_call(MLP(), {name: value}, (X,)).is_meta, "torch has caught up"
    with pytest.raises(
        errors.MetaTensorError, match="given a value there, while the call has real"
    ):
        fcall.functional_call(MLP(), {name: value}, X)
