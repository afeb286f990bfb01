"""Timing of contenders side by side: interleaved, warmed up, medians with quartiles."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Contenders = Mapping[str, Callable[[], Any]]


class Time(NamedTuple):
    """Microseconds a call: the median of the rounds, and their quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    contenders: Contenders, *, rounds: int = 15, seconds: float = 0.02
) -> dict[str, Time]:
    """Time ``contenders`` in turns, so that what disturbs the machine disturbs all of them.

    Args:
        contenders: What to call, by name. Each is called a few times first.
        rounds: How many turns each has.
        seconds: How long a turn is, about.
    """
    calls = {}
    for name, call in contenders.items():
        for _ in range(3):
            call()
        calls[name] = max(1, round(seconds / _seconds(call, 1)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            taken[name].append(_seconds(call, calls[name]) / calls[name] * 1e6)
    return {name: Time(*_median_and_quartiles(times)) for name, times in taken.items()}


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _median_and_quartiles(times: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def overheads(times: Mapping[str, Time], baseline: str) -> dict[str, float]:
    """Return what each contender's median has above that of ``baseline``, in microseconds."""
    return {
        name: time.median - times[baseline].median
        for name, time in times.items()
        if name != baseline
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table with a column for each key of ``rows``."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()])
    Console().print(table)


def store(name: str, record: dict[str, Any]) -> Path:
    """Write ``record`` with what it was measured on to ``perf/results/<name>.json``."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    measured_on = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**measured_on, **record}, indent=2) + "\n")
    return path
