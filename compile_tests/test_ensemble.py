"""``Ensemble``: as a loop over deep copies of the models, in float64; and as a module."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import capture, count_frames
from compile_tests.support.memory import live_bytes, peak_bytes, size_of
from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Normed,
    Recurrent,
    Shared,
    Tied,
)
from compile_tests.support.oracle import assert_close, in_float64, unchanged
from fcall.ensemble import Ensemble
from fcall.errors import NoModelsError, UnlikeModelsError

MEMBERS = 3

ways = pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.compiled)], ids=["eager", "compiled"]
)


class Dropped(nn.Module):
    """``(batch, 3) -> (batch, 8)``, half of it dropped in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


def several(name: str) -> list[nn.Module]:
    return [EXAMPLES[name]()[0] for _ in range(MEMBERS)]


def callable_of(ensemble: Ensemble, compiled: bool) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(ensemble, backend="aot_eager", fullgraph=True) if compiled else ensemble


def member_state(module: nn.Module) -> dict[str, Tensor]:
    """All of the state, also what is not persistent, under all names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def stacked(states: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    return {
        f"members.{name}": None if value is None else torch.stack([s[name] for s in states])
        for name, value in states[0].items()
    }


def check_as_a_loop(ensemble: Ensemble, models: list[nn.Module], x: Tensor, compiled: bool) -> None:
    """Call both twice, backward; compare outputs, gradients and state."""
    oracle = [copy.deepcopy(model).double() for model in models]
    inputs = in_float64(x)
    shared = ensemble.in_dims is None
    call = callable_of(ensemble, compiled)
    for _ in range(2):
        out = call(x)
        expected = [model(inputs if shared else inputs[i]) for i, model in enumerate(oracle)]
        assert_close(out, torch.stack(expected))
    if out.requires_grad:
        out.square().sum().backward()
        torch.stack(expected).square().sum().backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in oracle]
    assert_close({name: p.grad for name, p in ensemble.named_parameters()}, stacked(grads))
    assert_close(member_state(ensemble), stacked([member_state(model) for model in oracle]))


# --- Calls --------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("name", EXAMPLES)
def test_one_input_for_all(name: str, compiled: bool) -> None:
    models = several(name)
    ensemble = Ensemble(models)
    check_as_a_loop(ensemble, models, EXAMPLES[name]()[1], compiled)


@ways
@pytest.mark.parametrize("name", ["MLP", "Normed", "Counter", "Tied"])
def test_an_input_for_each(name: str, compiled: bool) -> None:
    models = several(name)
    x = torch.stack([EXAMPLES[name]()[1] for _ in models])
    check_as_a_loop(Ensemble(models, in_dims=0), models, x, compiled)


@ways
@pytest.mark.parametrize("name", ["Normed", "Counter"])
def test_in_chunks(name: str, compiled: bool) -> None:
    models = several(name)
    check_as_a_loop(Ensemble(models, chunk_size=2), models, EXAMPLES[name]()[1], compiled)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["MLP", "Tied"])
def test_one_graph_with_one_operator(name: str) -> None:
    result = capture(Ensemble(several(name)), EXAMPLES[name]()[1])
    assert (len(result.graphs), result.breaks, result.kinds) == (1, 0, ["operator"])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor, *, scale: Tensor, power: int = 1) -> dict[str, Tensor]:
        return {"out": (self.linear(x) * scale) ** power, "sum": x + y}


@ways
def test_several_arguments_and_outputs(compiled: bool) -> None:
    models = [TwoInputs() for _ in range(MEMBERS)]
    x, y, scale = torch.rand(4, 3), torch.rand(4, MEMBERS, 3), torch.rand(2)
    out = callable_of(Ensemble(models, in_dims=(None, 1)), compiled)(x, y, scale=scale, power=2)
    for i, model in enumerate(models):
        expected = model(x, y[:, i], scale=scale, power=2)
        assert_close({name: value[i] for name, value in out.items()}, expected)


@ways
def test_buffers_are_written_in_place(compiled: bool) -> None:
    ensemble = Ensemble([Normed() for _ in range(MEMBERS)])
    buffers = dict(ensemble.named_buffers())
    callable_of(ensemble, compiled)(torch.rand(4, 2, 6, 6))
    assert all(buffers[name] is buffer for name, buffer in ensemble.named_buffers())
    assert buffers["members.norm.num_batches_tracked"].tolist() == [1] * MEMBERS


@ways
def test_what_is_reassigned_can_be_written_in_place_later(compiled: bool) -> None:
    class Resets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            seen = self.count.clone()
            self.count = torch.zeros(2)  # the same for all members
            return x + seen

    models = [Resets() for _ in range(MEMBERS)]
    check_as_a_loop(Ensemble(models), models, torch.zeros(2), compiled)


# --- Randomness ---------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness(randomness: str, compiled: bool) -> None:
    model = Dropped()
    ensemble = Ensemble([copy.deepcopy(model) for _ in range(MEMBERS)], randomness=randomness)
    call = callable_of(ensemble, compiled)
    x = torch.rand(16, 3)
    dropped = call(x) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    for i in range(1, MEMBERS):
        assert torch.equal(dropped[i], dropped[0]) == (randomness == "same")
    ensemble.eval()
    assert_close(call(x), torch.stack([model.eval()(x)] * MEMBERS))


def test_randomness_can_be_an_error() -> None:
    ensemble = Ensemble([Dropped() for _ in range(MEMBERS)], randomness="error")
    with pytest.raises(RuntimeError, match="random"):
        ensemble(torch.rand(16, 3))
    ensemble.eval()(torch.rand(16, 3))


# --- As a module --------------------------------------------------------------------------------


def test_names_and_ties() -> None:
    models = [Tied() for _ in range(MEMBERS)]
    ensemble = Ensemble(models)
    assert len(ensemble) == MEMBERS
    assert list(ensemble.state_dict()) == [f"members.{name}" for name in models[0].state_dict()]
    assert ensemble.members.embed.weight is ensemble.members.out.weight
    assert len(list(ensemble.parameters())) == len(list(models[0].parameters()))
    assert all(isinstance(p, nn.Parameter) for p in ensemble.parameters())
    assert not any(t.is_meta for t in (*ensemble.parameters(), *ensemble.buffers()))
    assert "3 members" in repr(ensemble)
    assert "Embedding(7, 4)" in repr(ensemble)


def test_shared_submodules_stay_shared() -> None:
    ensemble = Ensemble([Shared() for _ in range(MEMBERS)])
    assert ensemble.members.first is ensemble.members.second
    assert ensemble.unstack()[0].first is not ensemble.unstack()[1].first


def test_what_is_frozen_or_not_persistent_stays_so() -> None:
    models = [Normed() for _ in range(MEMBERS)]
    for model in models:
        model.conv.requires_grad_(False)
        model.register_buffer("scratch", torch.zeros(1), persistent=False)
    ensemble = Ensemble(models)
    assert {name for name, p in ensemble.named_parameters() if p.requires_grad} == {
        "members.norm.weight",
        "members.norm.bias",
    }
    assert "members.scratch" not in ensemble.state_dict()
    ensemble.members.norm.requires_grad_(False)
    assert not any(p.requires_grad for p in ensemble.unstack()[0].parameters())


def test_the_models_are_not_touched() -> None:
    models = [Normed() for _ in range(MEMBERS)]
    with unchanged(models[0]), unchanged(models[1]):
        ensemble = Ensemble(models)
        ensemble(torch.rand(4, 2, 6, 6)).sum().backward()
        with torch.no_grad():
            for tensor in (*ensemble.parameters(), *ensemble.buffers()):
                tensor.zero_()


# AdamW scales each gradient to size one: not for Normed, where those of a bias are rounding errors.
@ways
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("MLP", torch.optim.AdamW), ("Tied", torch.optim.AdamW), ("Normed", torch.optim.SGD)],
)
def test_training(name: str, optimizer: type[torch.optim.Optimizer], compiled: bool) -> None:
    models = [model.double() for model in several(name)]
    x = in_float64(EXAMPLES[name]()[1])
    ensemble = Ensemble(models)
    call = callable_of(ensemble, compiled)
    together = optimizer(ensemble.parameters(), lr=0.1)
    for _ in range(3):
        together.zero_grad()
        call(x).square().sum().backward()
        together.step()
    for i, model in enumerate(models):
        alone = optimizer(model.parameters(), lr=0.1)
        for _ in range(3):
            alone.zero_grad()
            model(x).square().sum().backward()
            alone.step()
        assert_close(member_state(ensemble.unstack()[i]), member_state(model))


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda e: torch.load(io.BytesIO(saved(e)), weights_only=False),
        lambda e: loaded(e),
    ],
    ids=["deepcopy", "save and load", "state_dict"],
)
def test_copies_and_checkpoints(again: Callable[[Ensemble], Ensemble]) -> None:
    x = torch.arange(5)
    ensemble = Ensemble([Tied() for _ in range(MEMBERS)])
    twin = again(ensemble)
    assert_close(twin(x), ensemble(x))
    assert twin.members.embed.weight is twin.members.out.weight
    with torch.no_grad():
        twin.members.mix.weight.zero_()
    assert ensemble.members.mix.weight.abs().sum() > 0


def saved(ensemble: Ensemble) -> bytes:
    file = io.BytesIO()
    torch.save(ensemble, file)
    return file.getvalue()


def loaded(ensemble: Ensemble) -> Ensemble:
    twin = Ensemble([Tied() for _ in range(MEMBERS)])
    twin.load_state_dict(ensemble.state_dict())
    return twin


def test_to_another_dtype() -> None:
    models = [Normed() for _ in range(MEMBERS)]
    ensemble = Ensemble(models).to(torch.float64)
    x = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    assert_close(ensemble(x), torch.stack([model.double()(x) for model in models]))
    assert ensemble.unstack()[0].conv.weight.dtype == torch.float64


@ways
def test_it_can_itself_be_called_functionally(compiled: bool) -> None:
    models = [MLP() for _ in range(MEMBERS)]
    ensemble, x = Ensemble(models), torch.rand(4, 3)
    others = {name: p.detach().clone() for name, p in ensemble.named_parameters()}
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()

    def grads(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: fcall.functional_call(ensemble, p, x).square().sum())(
            params
        )

    torch._dynamo.reset()
    call = torch.compile(grads, backend="aot_eager", fullgraph=True) if compiled else grads
    found = call(others, x)
    for model in models:
        model(x).square().sum().backward()
    expected = [{name: p.grad for name, p in model.named_parameters()} for model in models]
    assert_close(found, stacked(expected))


# --- Modes --------------------------------------------------------------------------------------


class Frozen(Normed):
    """Keeps its batch norm in eval mode, whatever its own mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def test_modes_are_those_of_the_models() -> None:
    ensemble = Ensemble([Frozen().train() for _ in range(MEMBERS)])
    assert modes(ensemble) == [True, *modes(Frozen().train())]
    assert modes(ensemble.eval()) == [False] * 4
    assert modes(ensemble.unstack()[0]) == [False] * 3
    assert modes(ensemble.train()) == [True, True, True, False]
    assert modes(ensemble.unstack()[0]) == [True, True, False]
    assert not Ensemble([MLP().eval()]).training


def test_the_mode_of_one_part() -> None:
    ensemble = Ensemble([Normed() for _ in range(MEMBERS)])
    ensemble.members.norm.eval()
    ensemble(torch.rand(4, 2, 6, 6))
    assert ensemble.members.norm.num_batches_tracked.tolist() == [0] * MEMBERS
    assert modes(ensemble.unstack()[0]) == [True, True, False]


@pytest.mark.compiled
def test_a_change_of_mode_compiles_again_and_no_other_call() -> None:
    torch._dynamo.reset()
    models = [Normed() for _ in range(MEMBERS)]
    ensemble = Ensemble(models)
    backend, compilations = count_frames()
    call = torch.compile(ensemble, backend=backend, fullgraph=True)
    x = torch.rand(4, 2, 6, 6)
    for mode, total in ((True, 1), (True, 1), (False, 2), (True, 2)):
        ensemble.train(mode)
        expected = torch.stack([model.train(mode)(x) for model in models])
        assert_close(call(x), expected)
        assert len(compilations) == total


# --- Members again ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_unstack(name: str) -> None:
    models, x = several(name), EXAMPLES[name]()[1]
    members = Ensemble(models).unstack()
    for model, member in zip(models, members):
        assert type(member).__qualname__ == type(model).__qualname__
        assert_close(member_state(member), member_state(model))
        for (a, tensor), twin in zip(member_state(model).items(), member_state(member).values()):
            assert type(twin) is type(tensor)
            assert (twin is tensor, twin.requires_grad, a) == (False, tensor.requires_grad, a)
        ids, twins = ([*map(id, member_state(m).values())] for m in (model, member))
        assert [ids.index(i) for i in ids] == [twins.index(i) for i in twins]
        assert_close(member(x), model(x))
    first = size_of(member_state(members[0]).values())
    assert size_of([t for m in members for t in member_state(m).values()]) == MEMBERS * first


def test_unstacked_rnns_work() -> None:
    models, x = [Recurrent() for _ in range(2)], torch.rand(2, 5, 3)
    for model, member in zip(models, Ensemble(models).unstack()):
        assert_close(member(x), model(x))


def test_what_calls_leave_in_attributes_is_not_in_the_members() -> None:
    class Remembers(MLP):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    ensemble = Ensemble([Remembers() for _ in range(MEMBERS)])
    x = torch.rand(4, 3)
    out = ensemble.eval()(x)
    member = ensemble.unstack()[1]
    assert not hasattr(member, "last")
    assert not member.training
    assert_close(member(x), out[1])


def test_any_names_and_ensembles_of_ensembles() -> None:
    models = [nn.ModuleDict({"twin": MLP(), "members": MLP()}) for _ in range(2)]
    assert len(list(Ensemble(models).parameters())) == 8
    nested = Ensemble([Ensemble([MLP() for _ in range(2)]) for _ in range(MEMBERS)])
    x = torch.rand(4, 3)
    members = [member for ensemble in nested.unstack() for member in ensemble.unstack()]
    assert_close(nested(x).flatten(0, 1), torch.stack([member(x) for member in members]))


def test_subclasses_of_parameter() -> None:
    class Scaled(nn.Parameter):
        pass

    models = [nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        model.weight = Scaled(model.weight.detach())
    ensemble = Ensemble(models)
    assert type(ensemble.members.weight) is Scaled
    assert type(ensemble.unstack()[1].weight) is Scaled


# --- Tensors that are not registered ------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self, mask: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.masks = [torch.tensor(mask)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.masks[0]


@ways
def test_equal_plain_tensors_are_used(compiled: bool) -> None:
    models = [Masked([1.0, 0.0, 2.0]) for _ in range(MEMBERS)]
    check_as_a_loop(Ensemble(models), models, torch.rand(4, 3), compiled)


def test_others_are_refused() -> None:
    Ensemble([Masked([1.0, float("nan")]), Masked([1.0, float("nan")])])
    with pytest.raises(UnlikeModelsError, match="the plain attribute 'masks"):
        Ensemble([Masked([1.0, 0.0]), Masked([1.0, 0.0, 3.0])])
    models = [Masked([1.0, 0.0, 2.0]), Masked([1.0, 0.0, 3.0])]
    with pytest.raises(UnlikeModelsError, match=r"the plain attribute 'masks\[0\]'"):
        Ensemble(models)


def test_models_that_are_not_alike_are_refused() -> None:
    with pytest.raises(UnlikeModelsError, match=r"models\[1\] can't be stacked"):
        Ensemble([MLP(), MLP().eval()])
    with pytest.raises(NoModelsError):
        Ensemble([])


# --- Memory -------------------------------------------------------------------------------------


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 40), nn.BatchNorm1d(40))


def test_making_one_takes_no_more_than_its_own_memory() -> None:
    models = [wide() for _ in range(MEMBERS)]
    member = size_of(member_state(models[0]).values())
    assert peak_bytes(lambda: Ensemble(models)) == MEMBERS * member


def test_an_ensemble_lives_alone() -> None:
    before = live_bytes()
    ensemble = Ensemble([wide() for _ in range(MEMBERS)])
    size = size_of(member_state(ensemble).values())
    assert size == MEMBERS * size_of(member_state(wide()).values())
    assert live_bytes() - before == size
