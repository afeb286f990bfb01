"""``meta_copy``: all on meta, all that deepcopy keeps and the ties, and never a copy of a value."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.memory import live_bytes, peak_bytes, size_of
from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Normed,
    Plain,
    Recurrent,
    Shared,
    Tied,
    parametrized,
)
from fcall.meta import meta_copy
from fcall.stacking import stack_module_state

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda make=make: make()[0] for name, make in EXAMPLES.items()},
    "Plain": Plain,
    "Recurrent": Recurrent,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
}

each_model = pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in MODELS.items()])


def tensors_in(nest: Any) -> list[Tensor]:
    """All tensors that can be reached from ``nest``, but not through what is not its own."""
    foreign = (type, FunctionType, BuiltinFunctionType, ModuleType)
    found, seen, stack = [], set(), [nest]
    while stack:
        thing = stack.pop()
        if id(thing) not in seen and not isinstance(thing, foreign):
            seen.add(id(thing))
            stack.extend(gc.get_referents(thing))
            if isinstance(thing, Tensor):
                found.append(thing)
    return found


def named_slots(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def ties(module: nn.Module) -> list[int]:
    """For each slot the position of the first slot with its tensor."""
    ids = [id(tensor) for _, tensor in named_slots(module)]
    return [ids.index(number) for number in ids]


@each_model
def test_all_is_alike_and_on_meta(make: Callable[[], nn.Module]) -> None:
    model = make()
    base = meta_copy(model)
    slots, twins = named_slots(model), named_slots(base)
    assert [name for name, _ in twins] == [name for name, _ in slots]
    assert ties(base) == ties(model)
    for (_, tensor), (_, twin) in zip(slots, twins):
        assert twin.is_meta
        assert not tensor.is_meta
        assert type(twin) is type(tensor)
        assert (twin.dtype, twin.requires_grad) == (tensor.dtype, tensor.requires_grad)
        if not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            assert (twin.shape, twin.stride()) == (tensor.shape, tensor.stride())
    for (path, part), (twin_path, twin) in zip(parts_of(model), parts_of(base)):
        assert (twin_path, twin.training) == (path, part.training)
        assert sorted(vars(twin)) == sorted(vars(part))
    assert all(tensor.is_meta for tensor in tensors_in(base))


def test_shared_submodules_stay_shared() -> None:
    base = meta_copy(Shared())
    assert base.first is base.second


def test_rnns_list_the_twins() -> None:
    lstm = meta_copy(Recurrent()).lstm
    assert len(lstm._flat_weights) == 4
    assert all(w is getattr(lstm, n) for w, n in zip(lstm._flat_weights, lstm._flat_weights_names))


def test_tensors_outside_of_the_registry() -> None:
    model = MLP()
    model.plain = torch.ones(3, dtype=torch.float64)
    model.nest = {"same": model.plain, "more": [torch.ones(2, requires_grad=True)]}
    model.alias = [model.l1.weight]
    model.hidden = [nn.Parameter(torch.ones(4))]
    model.taped = model.l1.weight * 2  # copy.deepcopy refuses it
    base = meta_copy(model)
    assert all(tensor.is_meta for tensor in tensors_in(base))
    assert base.plain is base.nest["same"]
    assert base.plain.dtype == torch.float64
    assert base.nest["more"][0].requires_grad
    assert base.alias[0] is base.l1.weight
    assert isinstance(base.hidden[0], nn.Parameter)
    assert base.taped.shape == model.taped.shape


class Scaled(nn.Parameter):
    """A subclass of Parameter."""


def test_subclasses_of_parameter_and_layouts() -> None:
    model = nn.Linear(3, 2)
    model.weight = Scaled(torch.ones(3, 2).T)
    model.bias = Scaled(torch.ones(2), requires_grad=False)
    base = meta_copy(model)
    assert type(base.weight) is type(base.bias) is Scaled
    assert base.weight.stride() == (1, 2)
    assert not base.bias.requires_grad


def test_hooks_and_modes() -> None:
    model = Normed()
    model.norm.eval()
    calls = []
    model.conv.register_forward_hook(lambda module, *_: calls.append(module))
    base = meta_copy(model)
    assert (base.training, base.conv.training, base.norm.training) == (True, True, False)
    base(torch.ones(1, 2, 6, 6, device="meta"))
    assert calls == [base.conv]


def test_gradients_are_left_out() -> None:
    model = MLP()
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is None for p in meta_copy(model).parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_call_with_the_models_own_values(name: str) -> None:
    model, x = EXAMPLES[name]()
    expected = copy.deepcopy(model)(x)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(fcall.functional_call(meta_copy(model), state, x), expected)


@pytest.mark.parametrize("make", [MLP, Normed, Tied, Recurrent, Plain, parametrized])
def test_no_value_is_ever_copied(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert peak_bytes(lambda: meta_copy(model)) == 0


def test_the_usual_way_copies_and_the_count_sees_it() -> None:
    model = Tied()
    assert peak_bytes(lambda: copy.deepcopy(model).to("meta")) >= size_of(model.parameters())


def test_only_the_stack_lives() -> None:
    """The advice of docs/ensembles.md, in figures."""
    before = live_bytes()
    models = [nn.Linear(50, 40) for _ in range(3)]
    members = live_bytes() - before
    assert members == 3 * 51 * 40 * 4
    params, _ = stack_module_state(models)
    assert live_bytes() - before == 2 * members
    base = meta_copy(models[0])
    del models
    assert live_bytes() - before == members == size_of(params.values())
    x = torch.ones(50)
    call = torch.vmap(lambda p: fcall.functional_call(base, p, x))
    assert call(params).shape == (3, 40)
