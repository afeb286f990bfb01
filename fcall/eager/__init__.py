"""The route of a call outside of any trace: values stand in the live module."""

from fcall.eager import beside, custom_backward, direct, recompute, swap, threads
from fcall.eager.swap import Swap

__all__ = ["Swap", "beside", "custom_backward", "direct", "recompute", "swap", "threads"]
