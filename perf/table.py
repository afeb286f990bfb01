"""Tables: by rich where it is installed, else plain."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def show(title: str, columns: Sequence[str], rows: Rows, left: Collection[str] = ("",)) -> None:
    """Print ``rows``; the columns called as in ``left`` begin at the left, as words do."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(title, columns, rows, left))
        return
    if title:
        print(title)  # not the table's: there it would be as narrow as the table
    table = Table()
    for column in columns:
        word = column in left
        table.add_column(column, justify="left" if word else "right", no_wrap=word)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def plain(title: str, columns: Sequence[str], rows: Rows, left: Collection[str] = ("",)) -> str:
    """Return a table that needs no library."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns)
        ]
        return "  ".join(placed).rstrip()

    return "\n".join(
        [title, line(columns), "  ".join("-" * width for width in widths), *map(line, rows)]
    )


def figure(value: float | str | None) -> str:
    """Return ``value`` with three digits."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
