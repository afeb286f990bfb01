"""The contenders of JAX, with its jit: a forward by hand, and, of an MLP, Equinox and Flax NNX.

Their results are in the order and the layout of torch's parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from perf.timing import DEVICE, WAITS

# Before JAX is imported. It would take most of a GPU's memory for itself.
os.environ.setdefault("JAX_PLATFORMS", DEVICE.type)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("NPROC", "1")  # the threads of its pool on the CPU, as torch has one

import jax
from jax import numpy as jnp
from torch import Tensor, nn

from perf.jax_apply import array, arrays, attention_of, forward_of
from perf.jax_mlps import BUILD, Built
from perf.models import with_weights
from perf.peers import Absent, Calls, absent

try:
    jax.devices()
except (RuntimeError, AssertionError) as error:  # it asserts that some device is there
    raise Absent(f"JAX {jax.__version__} sees no {DEVICE.type} device: {error}") from error


def sums(weights: dict[str, Tensor], x: Tensor) -> Calls:
    """The ``Sum`` of compiled_call: ``x`` plus each of the weights."""

    def add(weights: Any, x: Any) -> Any:
        for weight in jax.tree.leaves(weights):
            x = x + weight
        return x

    return {"jax.jit, compiled": _ready(jax.jit(add), arrays(weights), array(x))}


def blocks(module: nn.Module, weights: dict[str, Tensor], x: Tensor, *, train: bool) -> Calls:
    """The blocks' forward, or the loss and the gradients of vectors."""
    attention, suffix = attention_of(x)
    forward = forward_of(module, attention)

    def step(weights: Any, x: Any) -> Any:
        def loss(weights: Any) -> Any:
            return jnp.square(forward(weights, x)).mean()

        return jax.value_and_grad(loss)(weights)

    call = _ready(jax.jit(step if train else forward), arrays(weights), array(x))

    def of_vectors() -> list[Any]:
        loss, grads = call()
        return [loss, *(grads[name] for name, weight in weights.items() if weight.ndim == 1)]

    return {f"JAX{suffix}, compiled": of_vectors if train else call}


def ensembles(models: list[nn.Module], x: Tensor, *, train: bool) -> Calls:
    """A call, or a step of gradient descent, of all of ``models``."""

    def call_of(build: Callable[..., Built]) -> Callable[[], Any]:
        built = [build(model) for model in models]
        apply = built[0].apply
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each.model for each in built])
        forward = jax.vmap(apply, in_axes=(0, None))

        def loss(stacked: Any, x: Any) -> Any:
            return jnp.square(forward(stacked, x)).mean((1, 2)).sum()

        def step(stacked: Any, x: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(stacked, x)
            new = jax.tree.map(lambda p, grad: p - 1e-12 * grad, stacked, grads)
            norm = sum(jnp.square(grad).sum() for grad in jax.tree.leaves(grads))
            return jnp.stack([value, norm]), new

        call = _ready(jax.jit(step if train else forward), stacked, array(x))
        return (lambda: call()[0]) if train else call

    return _of_each(models[0], call_of)


def per_sample_gradients(module: nn.Module, x: Tensor, y: Tensor) -> Calls:
    """The gradients of each sample."""

    def call_of(build: Callable[..., Built]) -> Callable[[], Any]:
        built = build(module)
        fn = jax.vmap(jax.grad(_loss(built.apply)), in_axes=(None, 0, 0))
        return _as_torch(built, _ready(jax.jit(fn), built.model, array(x), array(y)))

    return _of_each(module, call_of)


def jacobians(module: nn.Module, weights: dict[str, Tensor], x: Tensor, panel: str) -> Calls:
    """A Jacobian, or a product of it, or of the Hessian, with a vector of ones."""
    inputs = array(x)

    def call_of(build: Callable[..., Built]) -> Callable[[], Any]:
        built = build(with_weights(module, weights))

        def out(model: Any) -> Any:
            return built.apply(model, inputs)

        def product(model: Any) -> Any:
            ones = jax.tree.map(jnp.ones_like, model)
            gradient = jax.grad(lambda model: jnp.square(out(model)).mean())
            of = out if panel == "Jacobian-vector product" else gradient
            return jax.jvp(of, (model,), (ones,))[1]

        fn = product if "product" in panel else getattr(jax, panel)(out)
        call = _ready(jax.jit(fn), built.model)
        return call if panel == "Jacobian-vector product" else _as_torch(built, call)

    return _of_each(module, call_of)


def maml(module: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Calls:
    """The gradient of the mean loss over tasks after ``steps`` of gradient descent."""
    from perf.maml import RATE

    def call_of(build: Callable[..., Built]) -> Callable[[], Any]:
        built = build(with_weights(module, weights))
        loss = _loss(built.apply)

        def adapted(model: Any, x: Any, y: Any) -> Any:
            for _ in range(steps):
                grads = jax.grad(loss)(model, x, y)
                model = jax.tree.map(lambda p, grad: p - RATE * grad, model, grads)
            return loss(model, x, y)

        def mean(model: Any, x: Any, y: Any) -> Any:
            return jax.vmap(adapted, in_axes=(None, 0, 0))(model, x, y).mean()

        call = _ready(jax.jit(jax.grad(mean)), built.model, array(x), array(y))
        return _as_torch(built, call)

    return _of_each(module, call_of)


def _by_hand(module: nn.Module) -> Built:
    names = [name for name, _ in module.named_parameters()]
    weights = arrays(dict(module.named_parameters()))
    # JAX sorts the names.
    return Built(weights, forward_of(module), lambda results: [results[name] for name in names])


def _of_each(module: nn.Module, call_of: Callable[..., Callable[[], Any]]) -> Calls:
    """Return what ``call_of`` makes of each way to have ``module`` in JAX."""
    calls: Calls = {"JAX, compiled": call_of(_by_hand)}
    is_mlp = all(isinstance(layer, nn.Linear | nn.Tanh) for layer in module.children())
    if is_mlp and DEVICE.type == "cpu":  # on a GPU time is short: the libraries' kernels are JAX's
        for name, build in BUILD.items():
            try:
                calls[f"{name}, compiled"] = call_of(build)
            except (ImportError, Absent) as error:
                calls[f"{name}, compiled"] = absent(error)
    return calls


def _loss(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, x, y: jnp.square(apply(model, x) - y).mean()


_last: list[Any] = []
"""What was called last. A GPU does in order what JAX gives it."""

if DEVICE.type == "cuda":
    WAITS.append(lambda: jax.block_until_ready(_last))
    # Of float32, as torch does by default; of bfloat16 there is one precision only.
    jax.config.update("jax_default_matmul_precision", "highest")


def _ready(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a call that waits for its results where one of torch would: on the CPU."""
    if DEVICE.type == "cpu":
        return lambda: jax.block_until_ready(fn(*args))

    def call() -> Any:
        _last[:] = [fn(*args)]
        return _last[0]

    return call


def _as_torch(built: Built, call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: built.as_torch(call())
