"""The route of a call outside of any trace: values stand in the live module."""

from fcall.eager import alone, beside, custom_backward, direct, recompute, swap, threads
from fcall.eager.alone import is_alone, new_swap
from fcall.eager.beside import Beside
from fcall.eager.direct import Direct
from fcall.eager.swap import Swap

__all__ = [
    "Beside",
    "Direct",
    "Swap",
    "alone",
    "beside",
    "custom_backward",
    "direct",
    "is_alone",
    "new_swap",
    "recompute",
    "swap",
    "threads",
]
