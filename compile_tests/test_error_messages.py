"""What calls say that raise: which names, which module, what is near, all of it in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_tests.support.models import MLP, Shared, Tied
from compile_tests.support.oracle import unchanged
from fcall import errors, functional_call

X = torch.rand(2, 3)
V = torch.rand(3)


class WithRate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.5

    @property
    def twice(self) -> torch.Tensor:
        return V * 2


@pytest.mark.parametrize(
    ("make", "arguments", "options", "start"),
    [
        pytest.param(
            MLP, ({"l1.wieght": V, "aa": V, "l2.bias": V},), {"strict": True}, "Error(s) in "
            "reparametrizing for MLP:\n\tUnexpected key(s): 'aa', 'l1.wieght' "
            "(did you mean 'l1.weight'?).\n\tMissing key(s): 'l1.bias', 'l1.weight', 'l2.weight'.",
            id="strict",
        ),
        pytest.param(
            MLP, ({"l1.weight": V},), {"strict": True}, "Error(s) in reparametrizing for MLP:"
            "\n\tMissing key(s): 'l1.bias', 'l2.bias', 'l2.weight'.",
            id="missing-alone",
        ),
        pytest.param(
            nn.Identity, ({"b": V, "a": V},), {"strict": True},
            "Error(s) in reparametrizing for Identity:\n\tUnexpected key(s): 'a', 'b'.",
            id="unexpected-alone",
        ),
        pytest.param(
            MLP, ({"l1x.bias": V},), {}, "MLP has no submodule to which the key 'l1x.bias' leads "
            "(did you mean 'l1.bias'?).",
            id="path",
        ),
        pytest.param(
            MLP, ({"zz.zz": V},), {}, "MLP has no submodule to which the key 'zz.zz' leads.",
            id="path-without-proposal",
        ),
        pytest.param(
            MLP, ({"l1.weight.x": V},), {},
            "the key 'l1.weight.x' leads through 'weight', which in MLP is no submodule but a "
            "Parameter. ",
            id="path-through-a-tensor",
        ),
        pytest.param(
            WithRate, ({"twice": V},), {},
            "can't set 'twice': it is a property of WithRate without a setter",
            id="read-only",
        ),
        pytest.param(
            MLP, ({},), {"method": "decode"},
            "MLP has no method 'decode' to call (did you mean 'encode'?).",
            id="method",
        ),
        pytest.param(
            Tied, ({"out.weight": V, "embed.weight": V.clone()},), {},
            "functional_call got multiple values for keys ['embed.weight', 'out.weight'], "
            "which are tied in Tied. ",
            id="tied",
        ),
        pytest.param(
            Shared, ({"second.weight": V, "first.weight": V.clone()},), {"tie_weights": False},
            "functional_call got multiple values for keys ['first.weight', 'second.weight'], "
            "but in Shared ",
            id="shared",
        ),
        pytest.param(
            MLP, ([{"l1.bias": V}, {"l1.bias": V}],), {},
            "the key 'l1.bias' appeared in multiple dictionaries. ",
            id="duplicate",
        ),
        pytest.param(MLP, (5,), {}, "parameter_and_buffer_dicts must be a dict", id="number"),
        pytest.param(MLP, ([{}, 5],), {}, "parameter_and_buffer_dicts must be", id="part"),
        pytest.param(
            MLP, ({"l1.bias": None},), {},
            "the value given for 'l1.bias' is not a tensor but a NoneType. ",
            id="value",
        ),
        pytest.param(
            WithRate, ({"rate": V},), {},
            "the attribute 'rate' of WithRate is not a tensor but a float. ",
            id="attribute",
        ),
        pytest.param(MLP, ({"": V},), {}, "'' is not the name of a parameter or", id="empty-name"),
        pytest.param(MLP, ({5: V},), {}, "5 is not the name of a parameter or", id="number-name"),
        pytest.param(
            lambda: MLP().to("meta"), ({"l2.weight": V},), {},
            "MLP has tensors on the meta device that were given no value, while the call has real "
            "tensors: ['l1.bias', 'l1.weight', 'l2.bias']. ",
            id="meta",
        ),
        pytest.param(
            lambda: nn.DataParallel(MLP()), ({},), {},
            "functional_call can't be used with the nn.DataParallel module DataParallel. ",
            id="data-parallel",
        ),
    ],
)  # fmt: skip
def test_messages_of_calls(make: Any, arguments: Any, options: Any, start: str) -> None:
    module = make()
    with unchanged(module), pytest.raises(errors.FcallError) as caught:
        functional_call(module, *arguments, X, **options)
    assert str(caught.value).startswith(start)
    if start.endswith("."):
        assert str(caught.value) == start


def test_lazy_modules_are_named() -> None:
    module = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(errors.LazyModuleError) as caught:
        functional_call(module, {"0.weight": V, "0.bias": V}, X)
    assert caught.value.details == ("Sequential", ["0.bias", "0.weight"])
    assert type(module[0]) is nn.LazyLinear


def test_the_type_of_what_was_got() -> None:
    for dicts, kind in [(None, "NoneType"), ("l1", "str"), ([{}, 5], "a sequence with a int")]:
        with pytest.raises(errors.InvalidDictsError) as caught:
            functional_call(MLP(), dicts, X)
        assert caught.value.details == (kind,)
    with pytest.raises(errors.NotAModuleError) as not_a_module:
        functional_call("MLP", {}, X)
    assert not_a_module.value.details == ("str",)


def test_errors_of_the_module_are_not_touched() -> None:
    module = MLP()
    module.register_forward_hook(lambda *_: {}["missing"])
    with pytest.raises(KeyError) as caught:
        functional_call(module, {}, X)
    assert type(caught.value) is KeyError
    assert caught.value.__context__ is None
