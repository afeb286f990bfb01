"""How long plans are kept, and what they keep alive: nothing."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from compile_tests.support.models import MLP
from compile_tests.support.oracle import state_of, unchanged
from fcall import functional_call, plan


def call_once(module: nn.Module) -> None:
    functional_call(module, state_of(module), torch.rand(1, 3))


def test_a_module_is_freed_with_its_last_reference() -> None:
    gc.collect()
    gc.disable()
    try:
        module = MLP()
        call_once(module)
        references = [weakref.ref(part) for part in (*module.modules(), *module.parameters())]
        del module
        assert [r() for r in references] == [None] * len(references)
    finally:
        gc.enable()


def test_a_module_in_a_cycle_is_collected() -> None:
    module = MLP()
    object.__setattr__(module, "whole", module)
    call_once(module)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None


def test_given_values_are_not_kept() -> None:
    module = MLP()
    values = state_of(module)
    functional_call(module, values, torch.rand(1, 3))
    references = [weakref.ref(value) for value in values.values()]
    del values
    assert [r() for r in references] == [None] * len(references)


def test_a_replaced_submodule_is_not_kept() -> None:
    module = MLP()
    call_once(module)
    references = [weakref.ref(part) for part in (module.l1, module.l1.weight)]
    module.l1 = nn.Linear(3, 4)
    assert [r() for r in references] == [None, None]
    call_once(module)  # and a plan with a dead submodule is no trouble


def test_plans_go_with_their_module() -> None:
    gc.collect()
    before = set(plan._plans)
    module = MLP()
    call_once(module)
    assert set(plan._plans) - before == {id(module)}
    del module
    assert set(plan._plans) == before


def test_a_module_at_the_address_of_a_dead_one() -> None:
    numbers = set()
    count = 50
    for i in range(count):
        module = nn.Linear(2, 2, bias=i % 3 == 0)
        if i % 2:
            module = nn.Sequential(module)
        name = "0.weight" if i % 2 else "weight"
        numbers.add(id(module))
        with unchanged(module):
            out = functional_call(module, {name: torch.zeros(2, 2)}, torch.rand(1, 2))
        bias = module.get_parameter(name.replace("weight", "bias")) if i % 3 == 0 else 0
        assert torch.equal(out, torch.zeros(1, 2) + bias)
    assert len(numbers) < count, "no address was used again: this test tests nothing"
