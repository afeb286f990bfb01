"""For tests that run on a GPU: the fixture ``device`` is in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fcall
from compile_tests.support.models import EXAMPLES
from compile_tests.support.oracle import state_of

Values = dict[str, Tensor]

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)

only_cuda = pytest.mark.parametrize("device", [CUDA], indirect=True)
"""For what the CPU has nothing like."""

with_inductor = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.inductor]),
        pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.inductor]),
    ],
    indirect=True,
)
"""For what Inductor compiles: slow, and on the CPU other tests see it."""


def example(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """One of the modules that many tests call, on ``device``, with an input."""
    module, x = EXAMPLES[name]()
    return module.to(device), x.to(device)


def values_of(module: nn.Module, seed: int, *, learned: bool = False) -> Values:
    """Values for all of its state, not far from its own, on its device."""
    own, away = state_of(module), state_of(module, seed=seed)
    learnt = dict(module.named_parameters())
    return {
        name: (
            value + 0.3 * away[name].to(value.device) if value.is_floating_point() else value
        ).requires_grad_(learned and name in learnt)
        for name, value in own.items()
    }


def calling(module: nn.Module) -> Callable[[Values, Tensor], Tensor]:
    """A function of values and an input."""
    return lambda p, x: fcall.functional_call(module, p, x)


def inductor(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, **options)


def on(device: str, nest: Any) -> None:
    """Check that all tensors are on ``device``."""
    assert {tensor.device.type for tensor in pytree.tree_leaves(nest)} == {device}
