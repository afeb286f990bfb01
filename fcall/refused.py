"""What to say where a transform of ``torch.func`` refuses what a module writes in place."""

from __future__ import annotations

import re

from torch import nn

from fcall import _torch, errors

__all__ = ["refused_write"]

_REFUSALS = (
    "attempted to call in-place operation",  # grad, vjp, jvp and the like
    "(self, *extra_args) is not possible because",  # vmap
    "Batch norm got a batched tensor as input while the running_mean or running_var",  # vmap
)
"""What torch says when a write in place would go into a tensor that a transform shares."""

_WRONG_SHAPE = re.compile(
    r"output with shape (.*?) doesn\\?'t match the broadcast shape (.*?[\])])"
)
"""What it says of ``add_`` and ``sub_`` under vmap, where of others it says what the matter is.

In a trace it may be quoted.
"""


def refused_write(module: nn.Module, error: Exception) -> tuple[str, list[str], str] | None:
    """Return what an InPlaceUnderTransformError says, if ``error`` is torch's refusal of a write.

    torch knows the operation alone; here its module is known, too.
    """
    if isinstance(error, errors.FcallError):
        return None  # of a call inside of this one, which is nearer to the write
    words = next((line for line in str(error).splitlines() if _is_refusal(line)), None)
    if words is None:
        return None
    # Dynamo quotes the error in one of its own.
    words = words.rpartition("got RuntimeError(")[2].strip("'\")").split("\\n")[0]
    buffers = sorted(name for name, _ in module.named_buffers())
    return type(module).__name__, buffers, words


def _is_refusal(words: str) -> bool:
    if any(refusal in words for refusal in _REFUSALS):
        return True
    shapes = _WRONG_SHAPE.search(words)
    if not shapes or not _torch.in_vmap():
        return False
    dimensions, wanted = (len(re.findall(r"\d+", shape)) for shape in shapes.groups())
    return wanted == dimensions + 1  # the batch: else the shapes are wrong without vmap, too
