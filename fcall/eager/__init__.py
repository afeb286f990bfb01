"""The route of a call outside of any trace: values stand in the live module."""

from fcall.eager import custom_backward, recompute, threads
from fcall.eager.swap import Swap

__all__ = ["Swap", "custom_backward", "recompute", "threads"]
