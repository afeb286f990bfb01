"""``replace_all_batch_norm_modules_``: each class of batch norm, under vmap, and what it tells."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.compiled import capture
from compile_tests.support.oracle import assert_close
from fcall import errors, functional_call
from fcall.batch_norm import replace_all_batch_norm_modules_, replaced_batch_norms
from fcall.func import grad, stack_module_state, vmap

SHAPES = {1: (4, 3), 2: (4, 3, 2, 2), 3: (4, 3, 2, 2, 2)}


class OwnNorm(nn.BatchNorm1d):
    pass


CLASSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), SHAPES[1]),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), SHAPES[2]),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), SHAPES[3]),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, SHAPES[1]),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, SHAPES[2]),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, SHAPES[3]),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), SHAPES[1]),
    "without momentum": (lambda: nn.BatchNorm1d(3, momentum=None), SHAPES[1]),
    "without affine": (lambda: nn.BatchNorm1d(3, affine=False), SHAPES[1]),
    "a subclass": (lambda: OwnNorm(3), SHAPES[1]),
}
each_class = pytest.mark.parametrize("name", CLASSES)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a replaced module, with parameters if it was lazy, and two inputs."""
    make, shape = CLASSES[name]
    torch.manual_seed(0)
    module = replace_all_batch_norm_modules_(nn.Sequential(make(), nn.Tanh()))
    x = torch.rand(2, *shape)
    module(x[0])  # makes the parameters of a lazy one
    return module, x


@each_class
def test_it_does_as_torch(name: str) -> None:
    module, twin = (nn.Sequential(CLASSES[name][0](), nn.Tanh()) for _ in range(2))
    torch.func.replace_all_batch_norm_modules_(twin)
    assert replace_all_batch_norm_modules_(module) is module
    assert module[0].track_running_stats is twin[0].track_running_stats is False
    assert repr(module) == repr(twin)
    assert list(module.named_buffers()) == list(twin.named_buffers()) == []
    assert module[0].running_mean is module[0].running_var is module[0].num_batches_tracked is None
    assert replaced_batch_norms(module) == ["0"]
    assert module.training


@each_class
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "traced", [pytest.param(False, id="eager"), pytest.param(True, marks=pytest.mark.compiled)]
)
def test_vmap(name: str, training: bool, traced: bool) -> None:
    module, x = made(name)
    module.train(training)
    p = {n: torch.stack([v, v * 2]).detach() for n, v in module.named_parameters()}

    def over(call: Any) -> Callable[..., Any]:
        def loss(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            out = call(module, p, x)
            return (out * x).sum(), out

        return vmap(lambda p, x: grad(loss, argnums=1, has_aux=True)(p, x))

    mine = over(functional_call)
    got = capture(mine, p, x).out if traced else mine(p, x)
    assert_close(got, over(torch.func.functional_call)(p, x))
    members = [functional_call(module, {n: v[i] for n, v in p.items()}, x[i]) for i in range(2)]
    assert_close(got[1], torch.stack(members))


@each_class
def test_vmap_fails_without(name: str) -> None:
    make, shape = CLASSES[name]
    module, x = make(), torch.rand(2, *shape)
    module(x[0])
    with pytest.raises(errors.InPlaceUnderTransformError, match="replace_all_batch_norm_modules_"):
        vmap(lambda x: functional_call(module, {}, x))(x)


def nested() -> nn.Module:
    shared = nn.BatchNorm1d(3)
    inner = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "same": shared})
    others = [nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, track_running_stats=True)]
    already = nn.BatchNorm1d(3, track_running_stats=False)
    return nn.ModuleList([shared, inner, *others, already])


def test_what_was_replaced_is_listed() -> None:
    root = nested()
    assert replaced_batch_norms(root) == []
    replace_all_batch_norm_modules_(root)
    assert replaced_batch_norms(root) == ["0", "1.norm"]
    assert replaced_batch_norms(root[1]) == ["norm", "same"]
    assert replaced_batch_norms(replace_all_batch_norm_modules_(root)) == ["0", "1.norm"]
    assert root[3].running_mean is not None  # an instance norm is none


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m).to("meta"),
    ],
    ids=["deepcopy", "pickle", "meta"],
)
def test_copies_tell_too(again: Callable[[nn.Module], nn.Module]) -> None:
    assert replaced_batch_norms(again(replace_all_batch_norm_modules_(nested()))) == ["0", "1.norm"]


def test_the_root_itself() -> None:
    assert replaced_batch_norms(replace_all_batch_norm_modules_(nn.BatchNorm1d(2))) == [""]


def test_an_ensemble_on_a_base_without_memory() -> None:
    models = [
        replace_all_batch_norm_modules_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        for _ in range(3)
    ]
    p, buffers = stack_module_state(models)
    assert buffers == {}
    base, x = copy.deepcopy(models[0]).to("meta"), torch.rand(5, 3)
    out = vmap(lambda p: functional_call(base, p, x))(p)
    assert_close(out, torch.stack([model(x) for model in models]))
