"""The ways to call a module functionally that the fuzzer takes.

A transform is given another input beside the one that counts, whose result has to be as if it was
alone. The gradients of ``grad`` are compared with those of autograd, and these with the oracle's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fcall
from compile_tests.support.oracle import TOLERANCES

Run = Callable[[nn.Module, dict[str, Tensor], Tensor, bool, bool], Any]
"""Calls the module with values, an input, ``tie_weights`` and ``strict``; returns its output."""


def in_one_dict(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call with one dict."""
    return fcall.functional_call(module, values, x, tie_weights=ties, strict=strict)


def in_two_dicts(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call with the values in two dicts."""
    names = list(values)
    parts = [{name: values[name] for name in names[i::2]} for i in range(2)]
    try:
        return fcall.functional_call(module, parts, (x,), tie_weights=ties, strict=strict)
    finally:
        for part in parts:
            values.update(part)


def in_a_block(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call in a block that has the values."""
    with fcall.substitute(module, values, tie_weights=ties, strict=strict):
        return module(x)


class Once:
    """The tensors among values, each once: transforms wrap one that comes twice two times."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.tensors = {f"{id(value)}": value for value in values.values()}
        self._keys = {name: f"{id(value)}" for name, value in values.items()}

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what has ``tensors`` where the values have their own."""
        return {name: tensors[key] for name, key in self._keys.items()}


def in_vmap(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call for several inputs in ``vmap``: each result is as if it was alone."""

    def call(x: Tensor) -> Tensor:
        return fcall.functional_call(module, values, x, tie_weights=ties, strict=strict)

    return fcall.func.vmap(call)(_with_another(x))[1]


def in_vmap_over_values(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call for several inputs, each with its own values, in ``vmap``: an ensemble."""
    once = Once({name: value for name, value in values.items() if value.is_floating_point()})

    def call(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = {**values, **once.named(tensors)}
        out = fcall.functional_call(module, own, x, tie_weights=ties, strict=strict)
        return out, own

    stacked = {key: _with_another(value) for key, value in once.tensors.items()}
    out, after = fcall.func.vmap(call)(stacked, _with_another(x))
    values.update({name: value[1] for name, value in after.items()})
    return out[1]


def in_grad(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call in ``grad``, whose gradients have to be those of autograd."""
    once, gradients = _gradients_in_func(module, values, ties, strict)
    taken, (out, after) = gradients(once.tensors, x)
    values.update(after)
    _check_gradients(taken, out, once, x)
    return out


def in_vmap_of_grad(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call for several inputs in ``vmap`` of ``grad``: the gradients of each alone."""
    once, gradients = _gradients_in_func(module, values, ties, strict)
    results = fcall.func.vmap(gradients, (None, 0))(once.tensors, _with_another(x))
    taken, (out, after) = pytree.tree_map(lambda result: result[1], results)
    values.update(after)
    _check_gradients(taken, out, once, x)
    return out


def _gradients_in_func(
    module: nn.Module, values: dict[str, Tensor], ties: bool, strict: bool
) -> tuple[Once, Callable[..., Any]]:
    once = Once({name: value for name, value in values.items() if value.requires_grad})

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Any:
        own = {**values, **once.named(tensors)}
        out = fcall.functional_call(module, own, x, tie_weights=ties, strict=strict)
        return loss_of(out), (out, own)

    return once, fcall.func.grad(loss, (0, 1), has_aux=True)


def _check_gradients(taken: Any, out: Tensor, once: Once, x: Tensor) -> None:
    inputs = [*once.tensors.values(), x]
    assert_close([*taken[0].values(), taken[1]], [*autograd(out, inputs, retain_graph=True)])


def _with_another(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach() * 2, tensor])


def compiled(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    """Call in a compiled function."""
    torch._dynamo.reset()

    def call(values: Any, x: Tensor) -> Any:
        return fcall.functional_call(module, values, x, tie_weights=ties, strict=strict)

    return torch.compile(call, backend="aot_eager")(values, x)


TRANSFORMS: list[Run] = [in_vmap, in_vmap_over_values, in_grad, in_vmap_of_grad]
WAYS: list[Run] = [in_one_dict, in_two_dicts, in_a_block, *TRANSFORMS]


def assert_close(actual: Any, expected: Any) -> None:
    """Compare tensors, or lists of them, with the tolerance of float64, or what else happened."""
    if isinstance(actual, str) or isinstance(expected, str):
        assert actual == expected
        return
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCES[torch.float64])


def autograd(out: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the loss of ``out``."""
    return torch.autograd.grad(loss_of(out), inputs, materialize_grads=True, **options)


def loss_of(out: Tensor) -> Tensor:
    """Return a loss in which each element counts, and differently."""
    return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
