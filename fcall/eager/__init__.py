"""The route of a call outside of any trace: values are swapped into the live module."""

from fcall.eager.run import run

__all__ = ["run"]
