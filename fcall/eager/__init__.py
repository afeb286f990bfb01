"""The route of a call outside of any trace: values stand in the live module."""

from fcall.eager import beside, custom_backward, direct, recompute, swap, threads
from fcall.eager.swap import Swap, is_alone

__all__ = [
    "Swap",
    "beside",
    "custom_backward",
    "direct",
    "is_alone",
    "recompute",
    "swap",
    "threads",
]
