"""A value of another shape or on another device is legal; when a call fails, it may be why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fcall.binding import COMPILED_PART

__all__ = ["explain_mismatch"]

MOST = 8
"""How many names a note lists."""


def explain_mismatch(
    module: nn.Module, names: Sequence[str], values: Sequence[Any], error: BaseException
) -> None:
    """Add notes to ``error`` that name the tensors whose shapes or devices may be why.

    These are values whose shapes are not those of the module's own; and, where torch speaks of
    devices, all parameters and buffers of the call, if they are on several. torch's message knows
    the operation and two shapes or devices, but not whose they are. The exception stays the same
    object: its type and its arguments are what the module raised.

    Args:
        module: The module that was called, with its own tensors back in place.
        names: The names that values were given for.
        values: Their values.
        error: What the call raised; mutated, if there is something to say.
    """
    own = {_plain(name): tensor for name, tensor in _tensors(module)}
    given = list(zip(names, values))
    for note in (_on_shapes(module, own, given), _on_devices(module, own, given, error)):
        if note:
            _add_note(error, note)


def _on_shapes(
    module: nn.Module, own: dict[str, Any], given: Sequence[tuple[str, Any]]
) -> str | None:
    shapes = {name: _shape(tensor) for name, tensor in own.items()}
    lines = [
        f"{name!r} is {shape}, its own is {shapes[_plain(name)]}"
        for name, shape in ((name, _shape(value)) for name, value in given)
        if shape is not None and shapes.get(_plain(name)) not in (None, shape)
    ]
    if not lines:
        return None
    return (
        f"functional_call gave {type(module).__name__} values of other shapes than its own, "
        f"which it may not support: {_first(lines, '; ')}."
    )


def _on_devices(
    module: nn.Module,
    own: dict[str, Any],
    given: Sequence[tuple[str, Any]],
    error: BaseException,
) -> str | None:
    if "device" not in str(error):
        return None
    replaced = {id(own.get(_plain(name))) for name, _ in given}  # by any of their names
    left = [(name, tensor) for name, tensor in own.items() if id(tensor) not in replaced]
    places: dict[str, list[str]] = {}
    for name, tensor in (*given, *left):
        if _shape(tensor):  # a tensor without dimensions may be on the CPU always
            places.setdefault(str(tensor.device), []).append(repr(name))
    if len(places) < 2:
        return None
    fewest_first = sorted(places.items(), key=lambda place: len(place[1]))
    lines = [f"on {device} {_first(found, ', ')}" for device, found in fewest_first]
    return (
        f"functional_call ran {type(module).__name__} with parameters and buffers on several "
        f"devices: {'; '.join(lines)}. Move the values given to one with .to(device)."
    )


def _first(lines: Sequence[str], between: str) -> str:
    rest = f"{between}and {len(lines) - MOST} more" if len(lines) > MOST else ""
    return f"{between.join(lines[:MOST])}{rest}"


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
