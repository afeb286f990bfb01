"""What to say where a transform of ``torch.func`` refuses what a module writes in place."""

from __future__ import annotations

from torch import nn

from fcall import errors

__all__ = ["refused_write"]

_REFUSALS = (
    "attempted to call in-place operation",  # grad, vjp, jvp and the like
    "(self, *extra_args) is not possible because",  # vmap
    "Batch norm got a batched tensor as input while the running_mean or running_var",  # vmap
)
"""What torch says when a write in place would go into a tensor that a transform shares."""


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
    return any(refusal in words for refusal in _REFUSALS)
