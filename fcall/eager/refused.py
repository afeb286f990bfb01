"""What to do where a transform of ``torch.func`` refuses what a module writes in place."""

from __future__ import annotations

from torch import nn

from fcall import errors

__all__ = ["explain_refused_write"]

_REFUSALS = (
    "attempted to call in-place operation",  # grad, vjp, jvp and the like
    "(self, *extra_args) is not possible because",  # vmap
    "Batch norm got a batched tensor as input while the running_mean or running_var",  # vmap
)
"""What torch says when a write in place would go into a tensor that a transform shares."""


def explain_refused_write(module: nn.Module, error: RuntimeError) -> None:
    """Raise an error that says what to do, if ``error`` is torch's refusal of a write in place.

    torch knows the operation alone; here its module is known, too.

    Raises:
        InPlaceUnderTransformError: with ``error`` as its cause.
    """
    if isinstance(error, errors.FcallError):
        return  # of a call inside of this one, which is nearer to the write
    said = str(error)
    if any(refusal in said for refusal in _REFUSALS):
        buffers = sorted(name for name, _ in module.named_buffers())
        what = type(module).__name__, buffers, said.splitlines()[0]
        raise errors.InPlaceUnderTransformError(*what) from error
