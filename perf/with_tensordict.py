"""The contenders of tensordict: a module under its substitution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict
from torch import Tensor, nn

from perf.peers import Calls


def eager(module: nn.Module, weights: dict[str, Tensor]) -> Calls:
    """A function of the input that calls ``module`` with ``weights``."""
    return {"tensordict": _call(module, weights)}


def compiled(module: nn.Module, weights: dict[str, Tensor], compile: Callable[..., Any]) -> Calls:
    """The same, compiled."""
    return {"tensordict, compiled": compile(_call(module, weights))}


def _call(module: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    params = TensorDict(dict(weights)).unflatten_keys(".")

    def call(x: Tensor) -> Any:
        with params.to_module(module):
            return module(x)

    return call
