"""Many threads that call one module at the same time, each with weights of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.models import (
    MLP,
    Counter,
    Normed,
    Owner,
    Plain,
    Recurrent,
    Shared,
    Tied,
    parametrized,
)
from compile_tests.support.oracle import unchanged
from compile_tests.support.random_modules import add_the_parameters, halve_the_input
from compile_tests.support.slots import set_tensor, slots_of
from compile_tests.support.threads import run_beside, switching

THREADS = 8

calls_a_thread = pytest.mark.parametrize(
    "calls", [pytest.param(200, id="200"), pytest.param(2000, id="2000", marks=pytest.mark.slow)]
)


class Flaky(nn.Module):
    """Reassigns a buffer and then fails, for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mlp.l1(x)
        self.step = self.step + 1
        if hidden.sum() > self.step:
            raise ArithmeticError
        return self.mlp.l2(hidden)


class Renewed(nn.Module):
    """Deletes a parameter in each call, and registers another one in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        del self.scale
        self.register_parameter("scale", nn.Parameter(scale.detach() * 2))
        return x * self.scale + self.shift


def _hooked() -> nn.Module:
    module = MLP()
    module.l1.register_forward_pre_hook(halve_the_input)
    module.register_forward_hook(add_the_parameters)
    module.l2.register_forward_hook(add_the_parameters)
    return module


class Case(NamedTuple):
    """A module and an input; ``stateless`` if a plain call leaves the module as it is."""

    make: Callable[[], nn.Module]
    x: tuple[Any, ...] = (torch.rand(2, 3, dtype=torch.float64),)
    choose: Callable[[list[str], Random], list[str]] = lambda names, rng: names
    """The names to be given, of all that there are."""
    stateless: bool = True


def _registered(names: list[str], _: Random) -> list[str]:
    return [name for name in names if name not in ("0.weight", "plain", "_stored")]


def _by_plain_names(names: list[str], _: Random) -> list[str]:
    return [name for name in names if "parametrizations" not in name]


def _some(names: list[str], rng: Random) -> list[str]:
    return rng.sample(names, rng.randrange(len(names) + 1))


def _either(names: list[str], rng: Random) -> list[str]:
    return rng.choice([_registered, _by_plain_names])(names, rng)


CASES = {
    "MLP": Case(MLP),
    "some of the names": Case(MLP, choose=_some),
    "buffers written in place": Case(
        Normed, (torch.rand(2, 2, 4, 4, dtype=torch.float64),), stateless=False
    ),
    "reassigned": Case(Counter, stateless=False),
    "deleted and registered": Case(Renewed, stateless=False),
    "an LSTM": Case(Recurrent, (torch.rand(2, 2, 3, dtype=torch.float64),)),
    "ties": Case(Tied, (torch.arange(3),), choose=lambda names, _: [*names]),
    "shared": Case(Shared, choose=lambda names, _: [n for n in names if n.startswith("first")]),
    "hooks": Case(_hooked),
    "nested calls": Case(Owner),
    "parametrized, originals": Case(parametrized, choose=_registered),
    "parametrized, plain names": Case(parametrized, choose=_by_plain_names),
    "parametrized, either": Case(parametrized, choose=_either),
    "plain attributes": Case(Plain, (), choose=lambda names, _: ["plain", "weight"]),
    "raises": Case(Flaky, stateless=False),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ArithmeticError:
        return "raised"


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    return bool(one == other)


def _random_like(own: Tensor) -> Tensor:
    return torch.rand_like(own) if own.is_floating_point() else torch.ones_like(own)


class Caller:
    """Calls ``module`` again and again with values of its own, and knows what comes out."""

    def __init__(self, module: nn.Module, case: Case, seed: int) -> None:
        self.module, self.args = module, case.x
        own = {name: slot.tensor for name, slot in slots_of(module).items()}
        names = case.choose([name for name in own if own[name] is not None], Random(seed))
        torch.manual_seed(seed)
        made = {id(own[name]): _random_like(own[name]) for name in names}  # ties stay ties
        self.values = {name: made[id(own[name])] for name in names}
        twin = copy.deepcopy(module)
        slots = slots_of(twin)
        for name, value in self.values.items():
            is_parameter = slots[name].store == "_parameters"
            set_tensor(slots[name], nn.Parameter(value.clone()) if is_parameter else value.clone())
        self.out = _outcome(lambda: twin(*self.args))
        after = slots_of(twin)
        self.after = {name: after[name].tensor.detach() for name in self.values if name in after}

    def call(self, times: int) -> None:
        for _ in range(times):
            copies = {id(value): value.clone() for value in self.values.values()}
            given = {name: copies[id(value)] for name, value in self.values.items()}
            out = _outcome(lambda: fcall.functional_call(self.module, given, self.args))  # noqa: B023, called at once
            assert _alike(out, self.out)
            assert all(_alike(given[name], value) for name, value in self.after.items())


class Reader:
    """Looks at ``module`` as one that knows nothing of any call."""

    def __init__(self, module: nn.Module, case: Case) -> None:
        self.module, self.args, self.calls = module, case.x, case.stateless
        self.parameters = [(name, id(p)) for name, p in module.named_parameters()]
        self.buffers = [(name, id(b)) for name, b in module.named_buffers()]
        self.slots = {s: id(s.tensor) for s in slots_of(module).values() if s.store in STABLE}
        self.state = {name: t.clone() for name, t in module.state_dict().items()}
        self.out = module(*case.x) if case.stateless else None

    def look(self) -> None:
        module = self.module
        assert [(name, id(p)) for name, p in module.named_parameters()] == self.parameters
        assert [(name, id(b)) for name, b in module.named_buffers()] == self.buffers
        assert all(id(slot.tensor) == number for slot, number in self.slots.items())
        state = module.state_dict()
        assert [*state] == [*self.state]
        assert all(map(torch.equal, state.values(), self.state.values()))
        if self.calls:
            assert _alike(module(*self.args), self.out)


STABLE = ("_parameters", "_buffers", "plain")  # a parametrized tensor is computed at each look


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Check that the block leaves the module as it was: the very same dicts, and classes."""
    before = [(id(m._parameters), id(m._buffers), id(m._modules)) for m in module.modules()]
    kinds = {type(m): [*vars(type(m))] for m in module.modules()}
    with unchanged(module):
        yield
    assert [(id(m._parameters), id(m._buffers), id(m._modules)) for m in module.modules()] == before
    assert all(type(m._parameters) is type(m._buffers) is dict for m in module.modules())
    assert {kind: [*vars(kind)] for kind in kinds} == kinds


@calls_a_thread
@each_case
def test_each_thread_has_its_values(case: Case, calls: int) -> None:
    torch.manual_seed(0)
    module = case.make().double()
    callers = [Caller(module, case, seed) for seed in range(THREADS)]
    reader = Reader(module, case)
    with _undisturbed(module), switching():
        run_beside(
            [reader.look, reader.look],
            *[lambda caller=caller: caller.call(calls) for caller in callers],  # type: ignore[misc]
        )
