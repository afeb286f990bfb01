"""The warning that the older names give."""

from __future__ import annotations

import warnings

from fcall import _torch

__all__ = ["warn_deprecated"]


# ``torch.compile`` cannot trace a warning: it is given once, by the trace itself.
@_torch.evaluated_while_tracing
def warn_deprecated(old: str, new: str) -> None:
    """Warn the caller of the function that calls this one that ``new`` has replaced ``old``."""
    warnings.warn(f"`{old}` is deprecated: use `{new}`.", FutureWarning, stacklevel=3)
