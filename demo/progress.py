"""What the demo is doing now: a spinner on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn


class Progress:
    """Shows the slow steps on stderr, so that stdout holds the page alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._start = time.perf_counter()

    @contextmanager
    def step(self, text: str, *, still: bool = False) -> Iterator[None]:
        """Show `text` while the block runs; `still` starts no thread, for steps that are timed."""
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
            )
            with Bar(
                *columns, console=self._console, transient=True, auto_refresh=not still
            ) as bar:
                bar.add_task(text, total=None)
                yield
        else:
            elapsed = time.perf_counter() - self._start
            print(f"[{elapsed:6.1f} s] {text}", file=sys.stderr, flush=True)
            yield
