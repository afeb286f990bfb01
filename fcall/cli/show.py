"""What the commands show: tables, steps that take long, and mistakes in one line.

With rich on a terminal, and as plain text else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["CommandError", "human_size", "in_one_line", "print_line", "print_table", "step"]

MOST = 2000
"""How many characters of a message are shown."""


class CommandError(Exception):
    """A mistake in what a command was given."""


def in_one_line(error: BaseException) -> str:
    """Return the message of an error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = ""
    for line in filter(None, lines):
        text += ("" if not text else " " if text[-1] in ".:;," else "; ") + line
    return text if len(text) <= MOST else text[:MOST] + " ..."


def print_line(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, without the columns in which nothing stands."""
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head = [head[i] for i in filled]
    rows = [[row[i] for i in filled] for row in rows]
    rich = _rich() if sys.stdout.isatty() else None
    if rich is not None:
        table = rich.table.Table(*head, box=rich.box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*[rich.markup.escape(cell) for cell in row])
        rich.console.Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, ["-" * width for width in widths], *rows):
        print_line("  ".join([cell.ljust(width) for cell, width in zip(row, widths)]).rstrip())


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say on stderr what is being done, for as long as it lasts."""
    rich = _rich() if sys.stderr.isatty() else None
    if rich is not None:
        with rich.console.Console(stderr=True).status(rich.markup.escape(text)):
            yield
        return
    sys.stderr.write(f"{text} ...\n")
    sys.stderr.flush()
    yield


def human_size(count: int) -> str:
    """Return a number of bytes as in ``1.5 MB``."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB')[power]}"


def _rich() -> Any:
    try:
        import rich.box
        import rich.console
        import rich.markup
        import rich.status
        import rich.table
    except ImportError:
        return None
    return rich
