"""A parametrized tensor: by its plain name, which bypasses the parametrization, or its original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compile_tests.support.models import Symmetric, parametrized
from compile_tests.support.oracle import assert_close, unchanged
from compile_tests.support.parity import TORCH, both
from fcall import functional_call

WEIGHT = torch.arange(9.0).view(3, 3) + 1  # not symmetric


@both
def test_a_plain_name_disables_the_parametrization(call: Any) -> None:
    """As torch documents it. It runs ``right_inverse``, and leaves the module changed."""
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", Symmetric())
    own = module.parametrizations.weight.original
    version, values_before = own._version, own.detach().clone()
    out = call(module, {"weight": WEIGHT, "bias": torch.zeros(3)}, torch.eye(3))
    if call is TORCH:
        assert torch.equal(out.mT, WEIGHT.triu() + WEIGHT.triu(1).mT)
    else:
        assert torch.equal(out.mT, WEIGHT)
        assert own._version == version
    assert module.parametrizations.weight.original is own
    assert torch.equal(own, values_before)


def test_a_bypassed_parametrization_has_gradients() -> None:
    module, weight = parametrized(), WEIGHT.clone().requires_grad_()
    with unchanged(module):
        functional_call(module, {"0.weight": weight}, torch.randn(2, 3)).sum().backward()
    assert weight.grad is not None
    assert module[0].parametrizations.weight.original.grad is None


class Rewrites(nn.Module):
    """Doubles the weight of its parametrized layer, after it used it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        parametrize.register_parametrization(self.layer, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        with torch.no_grad():
            self.layer.weight = self.layer.weight * 2
        return out + self.layer(x)


def test_written_back_through_a_plain_name() -> None:
    module, given = Rewrites(), {"layer.weight": WEIGHT}
    with unchanged(module):
        out = functional_call(module, given, torch.eye(3))
    assert torch.equal(out, WEIGHT.mT * 3)
    assert torch.equal(given["layer.weight"], WEIGHT * 2)


def test_written_back_through_the_original() -> None:
    original = WEIGHT.clone()
    given = {"layer.parametrizations.weight.original": original}
    symmetric = WEIGHT.triu() + WEIGHT.triu(1).mT
    module = Rewrites()
    with unchanged(module):
        out = functional_call(module, given, torch.eye(3))
    assert_close(out, symmetric.mT * 3)
    assert_close(given["layer.parametrizations.weight.original"], symmetric.triu() * 2)


def test_a_parametrization_with_two_originals() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False), dim=0)
    lengths, directions = torch.tensor([[1.0], [2.0], [3.0]]), torch.eye(3) * 7
    given = {
        "parametrizations.weight.original0": lengths,
        "parametrizations.weight.original1": directions,
    }
    with unchanged(module):
        assert_close(functional_call(module, given, torch.eye(3)), lengths.flatten().diag())
        assert torch.equal(functional_call(module, {"weight": WEIGHT}, torch.eye(3)), WEIGHT.mT)
        both_ways = {**given, "weight": WEIGHT}
        assert torch.equal(functional_call(module, both_ways, torch.eye(3)), WEIGHT.mT)


def test_a_bypassed_original_on_meta_needs_no_value() -> None:
    module, real = parametrized().to("meta"), nn.Sequential(*[nn.Linear(3, 3) for _ in "012"])
    real[1] = nn.Tanh()
    x = torch.rand(2, 3)
    with unchanged(module):
        out = functional_call(module, dict(real.named_parameters()), x)
    assert_close(out, real(x))


def test_a_module_walks_its_own_tree_while_a_parametrization_is_bypassed() -> None:
    module = parametrized()
    counts = []
    module[1].register_forward_hook(
        lambda *_: counts.append((len(list(module.modules())), len(list(module.parameters()))))
    )
    expected = (len(list(module.modules())), len(list(module.parameters())))
    with unchanged(module):
        functional_call(module, {"0.weight": WEIGHT}, torch.randn(2, 3))
    assert len(counts) == 1
    assert counts[0][0] <= expected[0]


def test_a_call_inside_of_a_call_that_bypasses_a_parametrization() -> None:
    module, out = parametrized(), []
    linear = module[0]
    zero = {"bias": torch.zeros(3)}
    module[1].register_forward_hook(
        lambda *_: out.append(functional_call(linear, zero, torch.eye(3), method="forward"))
    )
    with unchanged(module):
        functional_call(module, {"0.weight": WEIGHT}, torch.randn(2, 3))
    assert torch.equal(out[0], WEIGHT.mT)


@pytest.mark.parametrize("key", ["weight", "parametrizations.weight.original"])
def test_the_cache_of_parametrizations_is_not_used_across_calls(key: str) -> None:
    """torch.func returns the value of the first call, for as long as the cache is on."""
    linear = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    one, other = torch.eye(3), torch.eye(3) * 2
    with parametrize.cached():
        own = linear(torch.eye(3))
        assert torch.equal(functional_call(linear, {key: one}, torch.eye(3)), one)
        assert torch.equal(functional_call(linear, {key: other}, torch.eye(3)), other)
        assert torch.equal(linear(torch.eye(3)), own)
