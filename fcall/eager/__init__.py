"""The route of a call outside of any trace: values are swapped into the live module."""

from fcall.eager.swap import Swap

__all__ = ["Swap"]
