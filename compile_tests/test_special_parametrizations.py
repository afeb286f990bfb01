"""Weights that are computed: by torch's parametrizations, by hooks, and by pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from compile_tests.support.models import Symmetric
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import TORCH, both
from fcall import functional_call

X = torch.eye(3)


def _linear(change: Callable[[nn.Module], Any]) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    change(module)
    return module


NEW = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, householder": functools.partial(
        parametrizations.orthogonal, orthogonal_map="householder"
    ),
    "orthogonal, cayley": functools.partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "symmetric": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "two": lambda m: [
        parametrize.register_parametrization(m, "weight", Symmetric()),
        parametrizations.spectral_norm(m),
    ],
}
OLD = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 4),
    "pruned twice": lambda m: [
        prune.l1_unstructured(m, "weight", 2),
        prune.ln_structured(m, "weight", 1, n=2, dim=0),
    ],
}
new = pytest.mark.parametrize("change", NEW.values(), ids=NEW.keys())
old = pytest.mark.parametrize("change", OLD.values(), ids=OLD.keys())
warns = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"
)


@new
@pytest.mark.parametrize("training", [True, False])
def test_parametrizations(change: Any, training: bool) -> None:
    module = _linear(change).train(training)
    values = {
        n: v.requires_grad_(n in dict(module.named_parameters()))
        for n, v in state_of(module, seed=1).items()
    }
    twin = loaded(module, values)
    with unchanged(module):
        out = functional_call(module, values, X, strict=True)
    expected = twin(X.double())
    assert_close(out, expected)
    trained = [v for v in values.values() if v.requires_grad]
    ours = torch.autograd.grad(out.square().sum(), trained)
    theirs = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
    assert_close(list(ours), list(theirs))
    assert_close({n: values[n] for n, _ in twin.named_buffers()}, dict(twin.named_buffers()))


@new
@both
def test_a_cache_round_two_calls(call: Any, change: Any) -> None:
    """torch.func gives the second call the first one's weight, and the module too."""
    module = _linear(change).eval()
    originals = [dict(state_of(module, seed=seed)) for seed in (1, 2)]
    expected = [loaded(module, values)(X.double()) for values in originals]
    own = module(X)
    with unchanged(module), parametrize.cached():
        out = [call(module, values, (X,)) for values in originals]
        after = module(X)
    assert_close(out[0], expected[0])
    right = torch.allclose(out[1].double(), expected[1], atol=1e-4), torch.equal(after, own)
    assert all(right) == (call is not TORCH), "torch has caught up"


def test_a_cache_is_used_within_a_call() -> None:
    """It is what a user of it wants: a weight that is read twice is computed once."""
    counts: list[int] = []

    class Counts(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            counts.append(1)
            return weight

    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + x @ self.weight

    module = Reads(3, 3)
    parametrize.register_parametrization(module, "weight", Counts())
    counts.clear()
    functional_call(module, {"bias": torch.zeros(3)}, X)
    assert len(counts) == 2
    with parametrize.cached():
        functional_call(module, {"bias": torch.zeros(3)}, X)
    assert len(counts) == 3


@warns
@old
@both
def test_weights_that_a_hook_computes(call: Any, change: Any) -> None:
    """A twin made in the same way has the values loaded: such a module cannot be copied."""
    module, twin = _linear(change), _linear(change).double()
    values = state_of(module, seed=1)
    twin.load_state_dict(values)
    trained = [name for name, _ in module.named_parameters()]
    given = {n: v.requires_grad_(n in trained) for n, v in values.items()}
    before = {name: (id(t), t.tolist()) for name, t in module.state_dict(keep_vars=True).items()}
    out, expected = call(module, given, (X,)), twin(X.double())
    assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), [given[n] for n in trained])
    theirs = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
    assert_close(list(ours), list(theirs))
    now = {name: (id(t), t.tolist()) for name, t in module.state_dict(keep_vars=True).items()}
    assert now == before
    assert_close(module.double()(X.double()), _linear(change).double()(X.double()))


@warns
@old
@both
def test_the_plain_name_of_a_weight_that_a_hook_computes(call: Any, change: Any) -> None:
    """The hook overwrites what is given; the attribute is given back afterwards."""
    module = _linear(change).eval()
    own, given = module.weight, {"weight": torch.full((3, 3), 9.0)}
    out = call(module, given, (X,))
    assert module.weight is own
    assert_close(out, module(X))
    assert not torch.equal(given["weight"], torch.full((3, 3), 9.0))
