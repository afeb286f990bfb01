"""What others do for the same: tensordict, and JAX with its own jit, Equinox and Flax NNX.

``make perf PEERS=1`` installs them, in the versions of ``peers.txt``, in a venv of their own, and
runs all contenders there, in one process. JAX is given one thread, and the CPU alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import equinox
import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from tensordict import TensorDict
from torch import Tensor, nn

Contenders = dict[str, Callable[[], Any]]


def to_module(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Callable[[], Any]:
    """Return a call of ``module`` under tensordict's substitution."""
    params = TensorDict(dict(weights)).unflatten_keys(".")

    def call(*_: Any) -> Any:
        with params.to_module(module):
            return module(x)

    return call


def sums(weights: dict[str, Tensor], x: Tensor) -> Contenders:
    """The ``Sum`` of compiled_call: ``x`` plus each of the weights."""

    def add(weights: Any, x: Any) -> Any:
        for weight in jax.tree.leaves(weights):
            x = x + weight
        return x

    arrays = {name: _array(weight) for name, weight in weights.items()}
    return {"jax.jit, compiled": _ready(jax.jit(add), arrays, _array(x))}


def ensembles(models: list[nn.Module], x: Tensor, *, train: bool) -> Contenders:
    """A call, or a step of gradient descent, of all of ``models``."""
    found: Contenders = {}
    for name, build in BUILD.items():
        built = [build(model) for model in models]
        apply = built[0][1]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[model for model, _ in built])
        forward = jax.vmap(apply, in_axes=(0, None))

        def loss(stacked: Any, x: Any, forward: Any = forward) -> Any:
            return jnp.square(forward(stacked, x)).mean((1, 2)).sum()

        def step(stacked: Any, x: Any, loss: Any = loss) -> Any:
            value, grads = jax.value_and_grad(loss)(stacked, x)
            new = jax.tree.map(lambda p, grad: p - 1e-12 * grad, stacked, grads)
            norm = sum(jnp.square(grad).sum() for grad in jax.tree.leaves(grads))
            return jnp.stack([value, norm]), new

        fn = jax.jit(step if train else forward)
        call = _ready(fn, stacked, _array(x))
        found[f"{name}, compiled"] = _first(call) if train else call
    return found


def per_sample_gradients(module: nn.Module, x: Tensor, y: Tensor) -> Contenders:
    """The gradients of each sample, as torch names and orders them."""
    found: Contenders = {}
    for name, build in BUILD.items():
        model, apply = build(module)
        fn = jax.jit(jax.vmap(jax.grad(_loss(apply)), in_axes=(None, 0, 0)))
        found[f"{name}, compiled"] = _as_torch(name, _ready(fn, model, _array(x), _array(y)))
    return found


def jacobians(module: nn.Module, weights: dict[str, Tensor], x: Tensor, panel: str) -> Contenders:
    """A Jacobian, or a product with the Hessian and a vector of ones."""
    from perf.models import with_weights

    found: Contenders = {}
    inputs = _array(x)
    for name, build in BUILD.items():
        model, apply = build(with_weights(module, weights))

        def out(model: Any, apply: Any = apply) -> Any:
            return apply(model, inputs)

        def product(model: Any, out: Any = out) -> Any:
            gradient = jax.grad(lambda model: jnp.square(out(model)).mean())
            ones = jax.tree.map(jnp.ones_like, model)
            return jax.jvp(gradient, (model,), (ones,))[1]

        fn = product if panel == "Hessian-vector product" else getattr(jax, panel)(out)
        found[f"{name}, compiled"] = _as_torch(name, _ready(jax.jit(fn), model))
    return found


def maml(
    module: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor, steps: int
) -> Contenders:
    """The gradient of the mean loss over tasks after ``steps`` of gradient descent."""
    from perf.maml import RATE
    from perf.models import with_weights

    found: Contenders = {}
    for name, build in BUILD.items():
        model, apply = build(with_weights(module, weights))
        loss = _loss(apply)

        def adapted(model: Any, x: Any, y: Any, loss: Any = loss) -> Any:
            for _ in range(steps):
                grads = jax.grad(loss)(model, x, y)
                model = jax.tree.map(lambda p, grad: p - RATE * grad, model, grads)
            return loss(model, x, y)

        def mean(model: Any, x: Any, y: Any, adapted: Any = adapted) -> Any:
            return jax.vmap(adapted, in_axes=(None, 0, 0))(model, x, y).mean()

        call = _ready(jax.jit(jax.grad(mean)), model, _array(x), _array(y))
        found[f"{name}, compiled"] = _as_torch(name, call)
    return found


# ----------------------------------------------------------------------------- the same MLP


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _equinox(module: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """Return an MLP of Equinox with the weights of ``module``, and how to call it on a batch."""
    layers = []
    for linear in _linears(module):
        own = equinox.nn.Linear(linear.in_features, linear.out_features, key=jax.random.key(0))
        new = _array(linear.weight), _array(linear.bias)
        layers.append(equinox.tree_at(lambda own: (own.weight, own.bias), own, new))

    def one(layers: Any, x: Any) -> Any:
        for layer in layers[:-1]:
            x = jnp.tanh(layer(x))
        return layers[-1](x)

    def apply(layers: Any, x: Any) -> Any:
        return jax.vmap(one, in_axes=(None, 0))(layers, x) if x.ndim > 1 else one(layers, x)

    return layers, apply


def _flax(module: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """Return the state of an MLP of Flax NNX, and how to call it."""
    layers: list[Any] = []
    for linear in _linears(module):
        own = nnx.Linear(linear.in_features, linear.out_features, rngs=nnx.Rngs(0))
        own.kernel[...] = _array(linear.weight).T
        own.bias[...] = _array(linear.bias)
        layers += [own, jnp.tanh]
    graph, state = nnx.split(nnx.Sequential(*layers[:-1]))
    return state, lambda state, x: nnx.merge(graph, state)(x)


BUILD = {"Equinox": _equinox, "Flax NNX": _flax}


def _loss(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, x, y: jnp.square(apply(model, x) - y).mean()


def _array(tensor: Tensor) -> Any:
    return jnp.asarray(tensor.detach().cpu().numpy())


def _ready(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a call that waits for its results, as it would for those of torch on the CPU."""
    return lambda: jax.block_until_ready(fn(*args))


def _first(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: call()[0]


def _as_torch(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call whose results are in the order and layout of torch's parameters."""

    def converted() -> Any:
        leaves = jax.tree.leaves(call())
        if name == "Equinox":
            return leaves
        pairs = zip(leaves[0::2], leaves[1::2])  # bias, kernel
        return [leaf for bias, kernel in pairs for leaf in (_Transposed(kernel), bias)]

    return converted


class _Transposed:
    """A kernel of Flax as torch has it; transposed when it is compared, not when it is timed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def tolist(self) -> Any:
        return np.asarray(self.kernel).swapaxes(-1, -2).tolist()
