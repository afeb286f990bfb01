"""An MLP of torch as one of Equinox and of Flax NNX, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from torch import nn

from perf.jax_apply import array


class Built(NamedTuple):
    """``apply`` calls ``model``; ``as_torch`` orders what has its structure as torch does."""

    model: Any
    apply: Callable[..., Any]
    as_torch: Callable[[Any], list[Any]]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _equinox(module: nn.Module) -> Built:
    import equinox

    layers = []
    for linear in _linears(module):
        own = equinox.nn.Linear(linear.in_features, linear.out_features, key=jax.random.key(0))
        new = array(linear.weight), array(linear.bias)
        layers.append(equinox.tree_at(lambda own: (own.weight, own.bias), own, new))

    def one(layers: Any, x: Any) -> Any:
        for layer in layers[:-1]:
            x = jnp.tanh(layer(x))
        return layers[-1](x)

    def apply(layers: Any, x: Any) -> Any:
        return jax.vmap(one, in_axes=(None, 0))(layers, x) if x.ndim > 1 else one(layers, x)

    return Built(layers, apply, jax.tree.leaves)


def _flax(module: nn.Module) -> Built:
    from flax import nnx

    layers: list[Any] = []
    for linear in _linears(module):
        own = nnx.Linear(linear.in_features, linear.out_features, rngs=nnx.Rngs(0))
        own.kernel[...] = array(linear.weight).T
        own.bias[...] = array(linear.bias)
        layers += [own, jnp.tanh]
    graph, state = nnx.split(nnx.Sequential(*layers[:-1]))

    def as_torch(results: Any) -> list[Any]:
        leaves = jax.tree.leaves(results)
        pairs = zip(leaves[0::2], leaves[1::2])  # bias, kernel
        return [leaf for bias, kernel in pairs for leaf in (_Transposed(kernel), bias)]

    return Built(state, lambda state, x: nnx.merge(graph, state)(x), as_torch)


BUILD: dict[str, Callable[[nn.Module], Built]] = {"Equinox": _equinox, "Flax NNX": _flax}


class _Transposed:
    """A kernel of Flax as torch has it; transposed when it is compared, not when it is timed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __dlpack_device__(self) -> Any:
        return self.kernel.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.kernel.swapaxes(-1, -2).__dlpack__(**options)
