"""Linear layers of many members: what AOTAutograd is given for them under ``vmap``.

What differentiates ``vmap`` from outside (``grad`` around it, or autograd behind a compiled
ensemble) sees a product with ``weight.mT``, and computes the gradient of that: the gradient of the
weight comes transposed. Whoever adds it to the weight, or keeps it as ``.grad``, then goes through
memory across its rows, at several times the time. So here the product of all members has
derivatives by hand, which come in the layout of what they are derivatives of. The forward is the
same, and so is its layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx import GraphModule, Interpreter

from fcall import _torch

__all__ = ["run"]


def run(body: GraphModule, operands: tuple[Any, ...]) -> Any:
    """Return ``body(*operands)``, whose nodes keep what they know of the user's code."""
    # torch.export records no functions with derivatives by hand.
    if _torch.runs_under_one_vmap() and not torch.compiler.is_exporting():
        return _OfMembers(body).run(*operands)
    return Interpreter(body).run(*operands)


class _OfMembers(Interpreter):
    """Runs a graph in the body of one ``vmap``, which no other transform is inside of."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``target``, or do what it does for members that have a weight each."""
        if target is _torch.linear and not kwargs and _has_own_weight(*args):
            x, weight, *bias = args
            out = _Product.apply(x, weight)
            return out if not bias or bias[0] is None else out + bias[0]
        return super().call_function(target, args, kwargs)


def _has_own_weight(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return (
        _torch.is_batched(weight)
        and (_torch.needs_gradient(weight) or _torch.needs_gradient(x))
        and weight.dim() == 2
        and x.dim() >= 2
        and not torch.is_autocast_enabled(x.device.type)  # which does not reach a backward by hand
    )


class _Product(Function):
    """Equivalent to ``lambda x, weight: x @ weight.mT``, of a batch of inputs, under ``vmap``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """Do the same for one member; never called for several."""
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: what is differentiated is :class:`_BatchedProduct`."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor
    ) -> tuple[Tensor, int]:
        """Do it for all members at once."""
        count = info.batch_size
        weight = weight.movedim(in_dims[1] or 0, 0)
        if in_dims[0] is None:
            rows = x.reshape(-1, x.shape[-1]).expand(count, -1, -1)
            shape = x.shape[:-1]
        else:
            x = x.movedim(in_dims[0], 0)
            rows = x.reshape(count, -1, x.shape[-1])
            shape = x.shape[1:-1]
        out = _BatchedProduct.apply(rows, weight)
        return out.reshape(count, *shape, weight.shape[1]), 0


class _BatchedProduct(Function):
    """Equivalent to ``lambda x, weight: x @ weight.mT``, of a matrix each for every member."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        return torch.bmm(x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients, each in the layout of what it is the gradient of."""
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        of_weight = torch.bmm(grad.mT, x) if ctx.needs_input_grad[1] else None
        return of_x, of_weight

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None) -> Tensor:
        """Return the tangent of the product."""
        x, weight = ctx.saved_tensors
        terms = []
        if of_x is not None:
            terms.append(torch.bmm(of_x, weight.mT))
        if of_weight is not None:
            terms.append(torch.bmm(x, of_weight.mT))
        return sum(terms[1:], terms[0])
