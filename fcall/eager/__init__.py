"""The route of a call outside of any trace: values are swapped into the live module."""

from fcall.eager.swap import run

__all__ = ["run"]
