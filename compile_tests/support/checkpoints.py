"""Modules with activation checkpoints, and their gradients by the oracle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from compile_tests.support.oracle import loaded

Function = Callable[[Tensor], Tensor]

non_reentrant = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op == torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _without_early_stop(function: Function, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return non_reentrant(function, x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "non-reentrant": non_reentrant,
    "reentrant": reentrant,
    "without early stop": _without_early_stop,
    "selective": partial(
        non_reentrant,
        context_fn=partial(create_selective_checkpoint_contexts, _keep_products),
    ),
    "nested": lambda f, x: non_reentrant(lambda x: non_reentrant(f, x), x),
    "nested reentrant": lambda f, x: reentrant(lambda x: reentrant(f, x), x),
    "reentrant outside": lambda f, x: reentrant(lambda x: non_reentrant(f, x), x),
    "sequential": lambda f, x: checkpoint_sequential(
        [nn.Identity(), f, nn.Identity()], 2, x, use_reentrant=False
    ),
    "sequential reentrant": lambda f, x: checkpoint_sequential(
        [nn.Identity(), f, nn.Identity()], 2, x, use_reentrant=True
    ),
}


class Block(nn.Module):
    """Two layers and dropout, ``(batch, 3) -> (batch, 3)``, checkpointed in one of the ways."""

    def __init__(self, way: str | None, dropout: float = 0.5) -> None:
        super().__init__()
        self.l1 = nn.Linear(3, 4)
        self.l2 = nn.Linear(4, 3)
        self.dropout = nn.Dropout(dropout)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.way is None else WAYS[self.way](self.compute, x)

    def compute(self, x: Tensor) -> Tensor:
        return self.dropout(self.l2(self.l1(x).tanh()).sin())


def network(way: str | None, **options: Any) -> nn.Module:
    return nn.Sequential(*[Block(way, **options) for _ in range(3)]).double()


def plain(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Return a copy of ``module`` that owns ``values`` and has no checkpoints."""
    twin = loaded(module, values)
    for child in twin.modules():
        if isinstance(child, Block):
            child.way = None
    return twin


def values_for(module: nn.Module, *, leaf: bool = True) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return values for the parameters, and the leaves that they are or are computed from."""
    leaves = [torch.rand_like(p).requires_grad_() for p in module.parameters()]
    scale = torch.rand((), dtype=torch.float64, requires_grad=True)
    values = leaves if leaf else [(scale * value).sin() for value in leaves]
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, values)), leaves if leaf else [*leaves, scale]


def gradients(call: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Return what backward of ``call`` adds to the gradients of ``inputs``."""
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(3)
    call().square().sum().backward()
    return [tensor.grad for tensor in inputs]


def expected_gradients(
    module: nn.Module, values: dict[str, Tensor], leaves: list[Tensor], x: Tensor
) -> list[Tensor | None]:
    """Return the same for a plain copy of ``module`` that owns ``values``."""
    twin, own_x = plain(module, values), x.detach().clone().requires_grad_(x.requires_grad)
    *of_values, of_x = gradients(lambda: twin(own_x), [*twin.parameters(), own_x])
    for tensor in leaves:
        tensor.grad = None
    torch.autograd.backward(list(values.values()), of_values)
    return [*[leaf.grad for leaf in leaves], of_x]


class Checkpointed(nn.Module):
    """Calls a submodule in a checkpoint, unless told not to."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner.double()
        self.reentrant = reentrant
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


class Times(nn.Module):
    """``x -> sin(weight * x)``, which needs both in backward."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sin()


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slope(weight: float, x: float) -> Tensor:
    """The gradient of ``Times`` with respect to its weight."""
    return x * torch.tensor(weight * x, dtype=torch.float64).cos()


def in_another_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
