"""Mistakes with weights on disk."""

from __future__ import annotations

from fcall.errors.base import FcallError, nearest

__all__ = [
    "MissingExtraError",
    "StateDtypeError",
    "StateFileError",
    "UnknownPrefixError",
]


class MissingExtraError(FcallError, ImportError):
    """A package is not installed. Details: what needs it, its name, the extra that has it."""

    template = "{} needs the package {!r}, which is not installed: pip install 'fcall[{}]'."


class StateFileError(FcallError, ValueError):
    """A file with weights cannot be read. Details: the path, what was found."""

    template = (
        "{} cannot be read as weights: {}. open_state takes a .safetensors file, the "
        ".safetensors.index.json of a sharded one, or a folder with either."
    )


class UnknownPrefixError(FcallError, ValueError):
    """No name in a file has the prefix. Details: the path, the prefix, the prefixes there are."""

    def describe(self, path: str, prefix: str, known: list[str]) -> str:
        """Return the message."""
        there = f"It has names with: {known}" if known else "Its names have no prefixes"
        return (
            f"{path} has no names with the prefix {prefix!r}{nearest(prefix, known)}. {there}. A "
            "prefix ends with a dot."
        )


class StateDtypeError(FcallError, TypeError):
    """Weights were to be read in no floating dtype. Details: what was given."""

    template = (
        "open_state(dtype=...) converts floating tensors to another floating dtype, such as "
        "torch.bfloat16, but got {}."
    )
