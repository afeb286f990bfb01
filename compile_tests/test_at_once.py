"""Weights that stand in a module while Dynamo traces it: put there at once, or as it is written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import capture, check_compiled
from compile_tests.support.models import MLP
from compile_tests.support.oracle import assert_close, state_of, unchanged
from fcall.operator import dynamo_names

pytestmark = pytest.mark.compiled

call = fcall.functional_call


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call, in each attempt to trace it, was given a placement."""
    found: list[bool] = []
    own = dynamo_names.PlaceVariable.call_function

    def recorded(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        result = own(self, tx, args, kwargs)
        found.append(len(result.items[1].items) > 0)
        return result

    monkeypatch.setattr(dynamo_names.PlaceVariable, "call_function", recorded)
    return found


KINDS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "list": lambda p: [dict(list(p.items())[:1]), dict(list(p.items())[1:])],
    "tuple": lambda p: (OrderedDict(list(p.items())[:3]), {}, dict(list(p.items())[3:])),
    "Parameter": lambda p: {k: nn.Parameter(v, requires_grad=False) for k, v in p.items()},
    "some": lambda p: dict(list(p.items())[:2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_at_once(kind: str, at_once: list[bool]) -> None:
    module, x = MLP(), torch.rand(2, 3)
    given = KINDS[kind](state_of(module, seed=1))
    check_compiled(lambda given, x: call(module, given, x), given, x, module=module)
    assert at_once == [True]


class Buffers(MLP):
    """Reassigns buffers, two of which are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("other", self.count)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.encode(x) * self.other


def test_reassigned_tensors_are_written_back_under_the_name_they_were_given_by(
    at_once: list[bool],
) -> None:
    module, x = Buffers(), torch.rand(2, 3)
    for names in (["count"], ["other"]):
        givens = [{name: torch.ones(()) for name in names} for _ in range(2)]
        before = [dict(given) for given in givens]
        expected = call(module, givens[0], x)
        with unchanged(module):
            out = capture(lambda given, x: call(module, given, x), givens[1], x).out
        assert_close(out, expected)
        for name in names:
            is_new = [g[name] is not b[name] for g, b in zip(givens, before)]
            assert is_new == [name == "count"] * 2
            assert_close(givens[1][name], givens[0][name])
    assert at_once == [True, True]


class Deletes(MLP):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.l1.bias
        del self.l1.bias
        return x @ self.l1.weight.T + bias


class OwnBuffer(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mine", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mine = self.mine + 1
        return self.encode(x) + self.mine


class Breaks(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        torch._dynamo.graph_break()
        return x + 1


def test_a_tensor_that_it_was_given_no_value_for_is_reassigned_as_eagerly() -> None:
    modules, x = (OwnBuffer(), OwnBuffer()), torch.rand(2, 3)
    given = {name: value for name, value in state_of(modules[0], seed=1).items() if name != "mine"}
    compiled = torch.compile(
        lambda given, x: call(modules[1], given, x), backend="aot_eager", fullgraph=True
    )
    for _ in range(3):
        assert_close(compiled(given, x), call(modules[0], given, x))
        assert_close(modules[1].mine, modules[0].mine)


def test_a_module_that_deletes_what_it_was_given() -> None:
    module, x = Deletes(), torch.rand(2, 3)
    given = state_of(module, seed=1)
    compiled = torch.compile(lambda given, x: call(module, given, x), backend="aot_eager")
    for fn in (compiled, fcall.compile(module, backend="aot_eager")):
        before = dict(given)
        with unchanged(module):
            out = fn(given, x)
        assert_close(out, call(Deletes(), given, x))
        assert list(given.items()) == list(before.items())


def test_a_module_that_breaks_the_graph(at_once: list[bool]) -> None:
    module, x = Breaks(), torch.rand(2, 3)
    given = state_of(module, seed=1)
    with unchanged(module):
        found = capture(lambda given, x: call(module, given, x) * 2, given, x, fullgraph=False)
    assert_close(found.out, call(module, given, x) * 2)
    # As an operator, inlined, and as it is written: in the function, and from the call on.
    assert at_once == [True, True, False] * 2
    assert found.breaks


class Counts(MLP):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.encode(x)


def test_a_module_with_state_in_python_is_inlined_at_once(at_once: list[bool]) -> None:
    module, x = Counts(), torch.rand(2, 3)
    given = state_of(module, seed=1)
    found = capture(lambda given, x: call(module, given, x), given, x)
    assert_close(found.out, call(module, given, x))
    assert found.kinds == ["inlined"]
    assert at_once == [True, True]
    assert module.calls == 2


class Tied(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.l3 = self.l1


def test_what_is_traced_as_it_is_written(at_once: list[bool]) -> None:
    x = torch.rand(2, 3)
    tied = Tied()
    given = state_of(tied, seed=1)
    both = {**given, **{f"l3.{key}": given[f"l1.{key}"] for key in ("weight", "bias")}}
    check_compiled(lambda given, x: call(tied, given, x), both, x, module=tied)

    class Kind(Tensor):
        pass

    module = MLP()
    of_kind = {name: value.as_subclass(Kind) for name, value in state_of(module, seed=1).items()}
    out = torch.compile(lambda given, x: call(module, given, x), backend="eager")(of_kind, x)
    assert_close(out.as_subclass(Tensor), call(module, of_kind, x).as_subclass(Tensor))
    assert not any(at_once)


def test_errors_are_those_of_an_eager_call(at_once: list[bool]) -> None:
    module, x = MLP(), torch.rand(2, 3)
    given = state_of(module, seed=1)
    wrong: list[tuple[Any, type[Exception]]] = [
        ([given, given], fcall.errors.DuplicateNameError),
        ({**given, "l1.wieght": torch.ones(1)}, fcall.errors.StrictKeysError),
        ({**given, "l1.weight": 1}, fcall.errors.NotATensorError),
    ]
    for dicts, error in wrong:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda dicts, x: call(module, dicts, x, strict=True), backend="eager", fullgraph=True
        )
        with pytest.raises(error):
            compiled(dicts, x)
    assert not any(at_once)


def test_calls_in_a_call() -> None:
    """The inner one finds the module in the state that the outer one gave it."""

    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return call(self.l2, {"bias": self.l2.bias + 1}, self.l1(x)) + self.l2(self.l1(x))

    module, x = Twice(), torch.rand(2, 3)
    given = state_of(module, seed=1)
    check_compiled(
        lambda given, x: call(module, given, x) + call(module, given, x),
        given,
        x,
        module=module,
        route=["operator"] * 4,
    )


def test_growth() -> None:
    """Dynamo traces no more instructions for more parameters, but those of the module."""
    from perf.counted import compilation

    found = compilation()
    growth = {name: n for name, n in found.items() if "instructions traced for one more" in name}
    assert list(growth.values()) == [0, 0]
