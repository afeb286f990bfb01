"""``stack_module_state``: as in torch.func, ties kept, and models that are not alike refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall
from compile_tests.support.compiled import capture
from compile_tests.support.memory import peak_bytes, size_of
from compile_tests.support.models import EXAMPLES, MLP, Normed, Shared, Symmetric, Tied
from compile_tests.support.oracle import assert_close, unchanged
from fcall.errors import LazyModuleError, NoModelsError, UnlikeModelsError
from fcall.meta import meta_copy
from fcall.stacking import stack_module_state

State = tuple[dict[str, Tensor], dict[str, Tensor]]

both = pytest.mark.parametrize(
    "stack",
    [
        pytest.param(torch.func.stack_module_state, id="torch"),
        pytest.param(stack_module_state, id="fcall"),
    ],
)


def several(name: str) -> list[nn.Module]:
    return [EXAMPLES[name]()[0] for _ in range(3)]


@both
@pytest.mark.parametrize("name", EXAMPLES)
def test_names_values_and_leaves(stack: Callable[..., State], name: str) -> None:
    models = several(name)
    params, buffers = stack(models)
    assert list(params) == [name for name, _ in models[0].named_parameters()]
    assert list(buffers) == [name for name, _ in models[0].named_buffers()]
    for name, tensor in {**params, **buffers}.items():
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
        assert torch.equal(tensor, torch.stack([state[name] for state in states]))
        assert tensor.is_leaf
        assert tensor.requires_grad == (name in params)


@both
def test_a_module_list_and_frozen_parameters(stack: Callable[..., State]) -> None:
    models = nn.ModuleList([MLP() for _ in range(2)])
    for model in models:
        model.l1.requires_grad_(False)
    params, _ = stack(models)
    assert [p.requires_grad for p in params.values()] == [False, False, True, True]


@pytest.mark.parametrize("make", [Tied, Shared])
def test_all_names_of_what_is_tied(make: Callable[[], nn.Module]) -> None:
    models = [make() for _ in range(2)]
    params, _ = stack_module_state(models, remove_duplicate=False)
    named = dict(models[0].named_parameters(remove_duplicate=False))
    assert list(params) == list(named)
    for a in named:
        for b in named:
            assert (params[a] is params[b]) == (named[a] is named[b])


def test_the_documented_recipe_with_ties() -> None:
    models = [Tied() for _ in range(3)]
    tokens = torch.arange(5)
    params, _ = stack_module_state(models)
    base = meta_copy(models[0])
    out = torch.vmap(lambda p: fcall.functional_call(base, p, tokens))(params)
    assert_close(out, torch.stack([model(tokens) for model in models]))


# --- Compiled -----------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["MLP", "Normed", "Tied", "Shared", "parametrized"])
def test_in_a_compiled_function(name: str) -> None:
    models = several(name)
    state = capture(lambda: stack_module_state(models)).out
    assert_close(state, stack_module_state(models))
    assert not any(tensor.requires_grad for tensor in state[0].values())


@pytest.mark.compiled
def test_gradients_in_a_compiled_function() -> None:
    models, x = [MLP() for _ in range(3)], torch.rand(5, 3)

    def grads(x: Tensor) -> dict[str, Tensor]:
        params, _ = stack_module_state(models)

        def loss(params: dict[str, Tensor]) -> Tensor:
            call = torch.vmap(lambda p: fcall.functional_call(models[0], p, x))
            return call(params).square().sum()

        return torch.func.grad(loss)(params)

    result = capture(grads, x)
    assert (len(result.graphs), result.breaks) == (1, 0)
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            assert_close(result.out[name][i], p.grad)


@pytest.mark.compiled
def test_errors_in_a_compiled_function() -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 4)]
    with pytest.raises(UnlikeModelsError, match=r"the shape of 'weight' is \(4, 3\), but \(2, 3\)"):
        capture(lambda: stack_module_state(models))
    with pytest.raises(NoModelsError):
        capture(lambda: stack_module_state([]))


# --- Models that are not alike ------------------------------------------------------------------


def changed(edit: Callable[[nn.Module], Any], make: Callable[[], nn.Module] = MLP) -> nn.Module:
    model = make()
    edit(model)
    return model


def untie(model: nn.Module) -> None:
    model.out.weight = nn.Parameter(torch.rand(7, 4))


def bias_to_buffer(model: nn.Module) -> None:
    del model.l2.bias
    model.l2.register_buffer("bias", torch.ones(2))


DIFFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "class": (MLP, Normed, "the class of the model is Normed, but MLP in"),
    "submodule": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        "the class of '1' is ReLU, but Tanh in",
    ),
    "length": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "the class of '1' is missing, but Tanh in",
    ),
    "mode": (MLP, lambda: MLP().eval(), "the mode of the model is eval, but train in"),
    "mode of a submodule": (
        Normed,
        lambda: changed(lambda m: m.norm.eval(), Normed),
        "the mode of 'norm' is eval, but train in",
    ),
    "requires_grad": (
        MLP,
        lambda: changed(lambda m: m.l1.bias.requires_grad_(False)),
        "requires_grad of 'l1.bias' is False, but True in",
    ),
    "name": (
        lambda: nn.Linear(3, 3),
        lambda: nn.Linear(3, 3, bias=False),
        "the kind of 'bias' is missing, but parameter in",
    ),
    "extra name": (
        lambda: nn.Linear(3, 3, bias=False),
        lambda: nn.Linear(3, 3),
        "the kind of 'bias' is parameter, but missing in",
    ),
    "kind": (
        MLP,
        lambda: changed(bias_to_buffer),
        "the kind of 'l2.bias' is buffer, but parameter in",
    ),
    "shape": (
        lambda: nn.Linear(3, 3),
        lambda: nn.Linear(3, 4),
        "the shape of 'weight' is (4, 3), but (3, 3) in",
    ),
    "dtype": (MLP, lambda: MLP().double(), "the dtype of 'l1.weight' is torch.float64, but"),
    "device": (MLP, lambda: MLP().to("meta"), "the device of 'l1.weight' is meta, but cpu in"),
    "untied": (
        Tied,
        lambda: changed(untie, Tied),
        "the first name of 'out.weight' is out.weight, but embed.weight in",
    ),
    "tied": (
        lambda: changed(untie, Tied),
        Tied,
        "the first name of 'out.weight' is embed.weight, but out.weight in",
    ),
    "parametrized": (
        lambda: nn.Linear(3, 3),
        lambda: changed(
            lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
            lambda: nn.Linear(3, 3),
        ),
        "the class of 'parametrizations' is ModuleDict, but missing in",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_is_named(case: str) -> None:
    make, make_other, clause = DIFFERENCES[case]
    models = [make(), make(), make_other(), make_other()]
    with pytest.raises(UnlikeModelsError) as info:
        stack_module_state(models)
    assert f"models[2] can't be stacked with models[0]: {clause}" in str(info.value)
    assert isinstance(info.value, RuntimeError)


@pytest.mark.parametrize(
    "case", ["submodule", "mode of a submodule", "extra name", "untied", "dtype", "tied"]
)
def test_torch_stacks_some_of_them_silently(case: str) -> None:
    """What differs on purpose."""
    make, make_other, _ = DIFFERENCES[case]
    if case == "tied":  # torch looks for a name that the second does not have
        with pytest.raises(KeyError):
            torch.func.stack_module_state([make(), make_other()])
    else:
        torch.func.stack_module_state([make(), make_other()])


@both
def test_no_models(stack: Callable[..., State]) -> None:
    with pytest.raises(RuntimeError, match=r"Expected at least one model, got 0\."):
        stack([])


def test_lazy_modules() -> None:
    models = [nn.Sequential(nn.LazyLinear(3)) for _ in range(2)]
    with pytest.raises(LazyModuleError, match=r"\['0.bias', '0.weight'\]"):
        stack_module_state(models)


def test_the_models_stay_as_they_are() -> None:
    models = [Normed() for _ in range(2)]
    with unchanged(models[0]), unchanged(models[1]):
        params, _ = stack_module_state(models)
        with torch.no_grad():
            params["conv.weight"].zero_()


# --- Memory -------------------------------------------------------------------------------------


def test_no_more_memory_than_the_stack_itself() -> None:
    models = [nn.Sequential(nn.Linear(50, 40), nn.BatchNorm1d(40)) for _ in range(3)]
    params, buffers = stack_module_state(models)
    stack = size_of([*params.values(), *buffers.values()])
    assert stack == 3 * size_of([*models[0].parameters(), *models[0].buffers()])
    assert peak_bytes(lambda: stack_module_state(models)) == stack


def test_the_count_sees_copies() -> None:
    models = [nn.Linear(50, 40) for _ in range(3)]
    stack = size_of(stack_module_state(models)[0].values())
    assert peak_bytes(lambda: stack_module_state(copy.deepcopy(models))) == 2 * stack
