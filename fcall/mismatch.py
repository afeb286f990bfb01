"""A value of another shape than the module's own is legal; when a call fails, it may be why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fcall.binding import COMPILED_PART

__all__ = ["explain_mismatched_shapes"]

MOST = 8
"""How many names a note lists."""


def explain_mismatched_shapes(
    module: nn.Module, names: Sequence[str], values: Sequence[Any], error: BaseException
) -> None:
    """Add a note to ``error`` that names the values whose shapes are not those of the module's own.

    torch's message knows the operation and two shapes, but not whose they are. The exception stays
    the same object: its type and its arguments are what the module raised.

    Args:
        module: The module that was called, with its own tensors back in place.
        names: The names that values were given for.
        values: Their values.
        error: What the call raised; mutated, if there is something to say.
    """
    own = {_plain(name): _shape(tensor) for name, tensor in _tensors(module)}
    lines = [
        f"{name!r} is {given}, its own is {own[_plain(name)]}"
        for name, given in zip(names, map(_shape, values))
        if given is not None and own.get(_plain(name)) not in (None, given)
    ]
    if lines:
        rest = f"; and {len(lines) - MOST} more" if len(lines) > MOST else ""
        _add_note(
            error,
            f"functional_call gave {type(module).__name__} values of other shapes than its own, "
            f"which it may not support: {'; '.join(lines[:MOST])}{rest}.",
        )


def _tensors(module: nn.Module) -> Any:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _plain(name: str) -> str:
    return ".".join([part for part in name.split(".") if part != COMPILED_PART])


def _shape(tensor: Any) -> tuple[int, ...] | None:
    """Return the shape; None of a lazy parameter, which has none yet, or of what is no tensor."""
    try:
        return tuple(tensor.shape)
    except (AttributeError, RuntimeError):
        return None


def _add_note(error: BaseException, note: str) -> None:
    if note in getattr(error, "__notes__", ()) or any(note in str(arg) for arg in error.args):
        return  # said by a call inside of this one
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):  # Python 3.10
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
