"""Exceptions raised at any point of the library's own code: one fault a run, at each point in turn.

``sys.settrace`` calls back before each bytecode (or line) of a frame. What the callback raises
comes out of the frame just there, as an interrupt would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import fcall

LIBRARY = str(Path(fcall.__file__).parent)


class Fault(BaseException):
    """What is raised; no ``Exception``, as a KeyboardInterrupt is none."""


class Injector:
    """Raises at the bytecode, or line, with a number, of those that the library runs."""

    def __init__(self, number: int, *, event: str = "opcode", error: type[BaseException] = Fault):
        self.left = number
        self.event = event
        self.error = error
        self.where = ""
        """The file and line where it was raised, or an empty string."""

    def run(self, call: Callable[[], Any]) -> None:
        """Run ``call``, and swallow the fault."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except self.error:
            if not self.where:
                raise
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY) or _is_finalizing(frame):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        frame.f_trace_lines = self.event == "line"
        return self._step

    def _step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == self.event:
            if self.left == 0:
                code = frame.f_code
                name = Path(code.co_filename).relative_to(LIBRARY)
                self.where = f"{name}:{frame.f_lineno} in {_name_of(code)}"
                raise self.error
            self.left -= 1
        return self._step


def _is_finalizing(frame: FrameType | None) -> bool:
    """Whether this is in a ``__del__``, where Python lets nothing out."""
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _name_of(code: CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))  # Python 3.10 has the short one alone


def points(
    prepare: Callable[[], Callable[[], Any]], *, event: str = "opcode", step: int = 1
) -> Iterator[str]:
    """Yield each point that a call passes, after a call with a fault there.

    Args:
        prepare: Makes what is called; once for each fault, so that none sees what another left.
        event: What a point is: an ``"opcode"`` or a ``"line"``.
        step: Which points are taken: every one, every second and so on.
    """
    never = 10**9
    whole = Injector(never, event=event)
    whole.run(prepare())
    # Not until there are no more: what one fault leaves behind could make the next call longer.
    for number in range(0, never - whole.left, step):
        injector = Injector(number, event=event)
        injector.run(prepare())
        if injector.where:
            yield injector.where
