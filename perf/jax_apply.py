"""The forward of torch's modules in jax.numpy: a function of their weights, by torch's names.

It also takes one sample, without a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import torch
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn

from perf.timing import DEVICE

Attention = Callable[[Any, Any, Any], Any]


def array(tensor: Tensor) -> Any:
    """Return a copy of ``tensor`` on JAX's device."""
    exact = tensor.detach().float().cpu().numpy()  # numpy has no bfloat16
    return jnp.asarray(exact, dtype=str(tensor.dtype).removeprefix("torch."), copy=True)


def arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: array(tensor) for name, tensor in tensors.items()}


def forward_of(
    module: nn.Module, attention: Attention = jax.nn.dot_product_attention
) -> Callable[..., Any]:
    """Return the forward of ``module``, a function of weights and input."""
    return partial(RULES[type(module)], module, attention)


def attention_of(x: Tensor) -> tuple[Attention, str]:
    """Return the fastest attention there is for inputs like ``x``, and how it is called.

    XLA's own keeps all scores; cuDNN's is of the kind that torch has, for 16 bits.
    """
    fused = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if DEVICE.type == "cpu" or x.dtype == torch.float32:
        return jax.nn.dot_product_attention, ""
    probe = jnp.zeros((1, 128, 1, 128), "bfloat16")
    try:
        jax.jit(fused)(probe, probe, probe).block_until_ready()
    except (RuntimeError, ValueError, NotImplementedError):
        return jax.nn.dot_product_attention, " without cuDNN's attention"
    return fused, ""


def _sequential(module: nn.Sequential, attention: Attention, weights: Any, x: Any) -> Any:
    for name, layer in module.named_children():
        x = RULES[type(layer)](layer, attention, _below(weights, name), x)
    return x


def _below(weights: dict[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def _linear(module: Any, attention: Attention, weights: Any, x: Any) -> Any:
    return x @ weights["weight"].T + weights["bias"]


def _conv(module: nn.Conv2d, attention: Attention, weights: Any, x: Any) -> Any:
    padding = [(int(p), int(p)) for p in module.padding]
    names = ("NCHW", "OIHW", "NCHW")
    batch = x if x.ndim == 4 else x[None]
    out = lax.conv_general_dilated(
        batch, weights["weight"], module.stride, padding, dimension_numbers=names
    )
    out = out + weights["bias"][:, None, None]
    return out if x.ndim == 4 else out[0]


def _norm(module: nn.LayerNorm, attention: Attention, weights: Any, x: Any) -> Any:
    exact = x.astype("float32")  # as torch does it
    mean, variance = exact.mean(-1, keepdims=True), exact.var(-1, keepdims=True)
    normal = (exact - mean) * lax.rsqrt(variance + module.eps)
    return (normal * weights["weight"] + weights["bias"]).astype(x.dtype)


def _self_attention(
    module: nn.MultiheadAttention, attention: Attention, weights: Any, x: Any
) -> Any:
    packed = x @ weights["in_proj_weight"].T + weights["in_proj_bias"]
    heads = packed.reshape(*x.shape[:-1], 3, module.num_heads, module.head_dim)
    out = attention(heads[..., 0, :, :], heads[..., 1, :, :], heads[..., 2, :, :])
    return _linear(None, attention, _below(weights, "out_proj"), out.reshape(x.shape))


def _block(module: nn.TransformerEncoderLayer, attention: Attention, weights: Any, x: Any) -> Any:
    def of(name: str, x: Any) -> Any:
        layer = getattr(module, name)
        return RULES[type(layer)](layer, attention, _below(weights, name), x)

    x = x + of("self_attn", of("norm1", x))
    hidden = jax.nn.gelu(of("linear1", of("norm2", x)), approximate=False)
    return x + of("linear2", hidden)


RULES: dict[type, Callable[..., Any]] = {
    nn.Sequential: _sequential,
    nn.Linear: _linear,
    nn.Tanh: lambda module, attention, weights, x: jnp.tanh(x),
    nn.ReLU: lambda module, attention, weights, x: jax.nn.relu(x),
    nn.Conv2d: _conv,
    nn.AdaptiveAvgPool2d: lambda module, attention, weights, x: x.mean((-2, -1), keepdims=True),
    nn.Flatten: lambda module, attention, weights, x: x.reshape(*x.shape[: module.start_dim], -1),
    nn.LayerNorm: _norm,
    nn.MultiheadAttention: _self_attention,
    nn.TransformerEncoderLayer: _block,
}
"""Of these modules, as :mod:`perf.models` makes them."""
