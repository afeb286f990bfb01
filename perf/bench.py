"""Contenders side by side: interleaved, warmed up, synchronised, medians with quartiles.

A row of a record holds one contender at one size: the keys of :data:`Row`, in any question.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from operator import sub, truediv
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr when it starts

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree


def device(name: str) -> torch.device:
    """Return the device called ``name``; of an empty name, the GPU if there is one."""
    there = torch.cuda.is_available()
    if name not in ("", "cpu", "cuda"):
        raise SystemExit(f"perf: the device is cpu or cuda, not {name!r}")
    if name == "cuda" and not there:
        build = torch.version.cuda and f"for CUDA {torch.version.cuda}"
        raise SystemExit(
            "perf: cuda was asked for, but torch sees no CUDA device: "
            f"torch {torch.__version__} was built {build or 'without CUDA'}"
        )
    return torch.device(name or ("cuda" if there else "cpu"))


DEVICE = device(os.environ.get("PERF_DEVICE", ""))
FOLDER = "cuda" if DEVICE.type == "cuda" else ""
"""Where in the folders of results and of plots those of this device are."""
RESULTS = Path(__file__).parent / "results" / FOLDER

Contenders = Mapping[str, Callable[[], Any]]
"""What to call, by name. Ratios of ``"X, compiled"`` and ``"fcall.compile"`` are to
``"torch.func, compiled"``."""

Row = dict[str, Any]
"""``panel`` and ``n``: where it was measured; ``contender``; ``median``, ``low``, ``high``: time a
call; ``ratio``: how many times the time of torch.func is its own; ``peak_bytes``: of new tensors,
at the worst moment of a call; ``off_by``: the largest relative difference of its results from those
of the first contender. Of some questions more: see :data:`OPTIONAL`."""


def measure(
    contenders: Contenders,
    *,
    panel: str,
    n: int,
    quick: bool = False,
    above: str | None = None,
    memory: bool = True,
    rounds: int = 15,
    seconds: float = 0.02,
) -> list[Row]:
    """Time ``contenders`` in turns, so that what disturbs the machine disturbs all of them.

    Args:
        contenders: What to time. Each is called a few times first; their results are compared.
        panel: What is varied, or at what else it is measured.
        n: The size at which it is measured.
        quick: Whether rough figures do.
        above: A contender whose time is no merit of the others: ratios are of the time above it.
        memory: Whether to measure the peak of memory.
        rounds: How many turns each has.
        seconds: How long a turn is, about.
    """
    results = {name: call() for name, call in contenders.items()}
    reference = next(iter(results.values()))
    off_by = {name: difference(result, reference) for name, result in results.items()}
    del results, reference
    peaks: dict[str, int | None] = dict.fromkeys(contenders)
    if memory:  # nothing is seen of that of JAX
        peaks = {name: peak_bytes(call) or None for name, call in contenders.items()}
    times = interleaved(
        contenders, rounds=3 if quick else rounds, seconds=0.001 if quick else seconds
    )
    extra = {name: {"peak_bytes": peaks[name], "off_by": off_by[name]} for name in contenders}
    return rows_of(times, panel=panel, n=n, above=above, extra=extra)


def interleaved(contenders: Contenders, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return for each of ``contenders`` its times, in microseconds, one for each round."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(2):
            call()
        calls[name] = max(1, round(seconds / _seconds(call, 1)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            taken[name].append(_seconds(call, calls[name]) / calls[name] * 1e6)
    return taken


def rows_of(
    times: Mapping[str, Sequence[float]],
    *,
    panel: str,
    n: int,
    above: str | None = None,
    extra: Mapping[str, Row] | None = None,
) -> list[Row]:
    """Return a row for each contender, of all its ``times``.

    Differences and ratios are taken round by round, and then the median: what slows the machine
    down for some rounds slows all contenders down.
    """
    base = times[above] if above else ()
    rows = []
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        its = times["torch.func, compiled" if "compile" in name else "torch.func"]
        row = {"panel": panel, "n": n, "contender": name}
        row |= {"median": median, "low": low, "high": high}
        if above:
            own = row["above"] = _median_above(taken, base)
            row["ratio"] = _median_above(its, base) / own if own > 0 else None
        else:
            row["ratio"] = statistics.median(map(truediv, its, taken))
        rows.append(row | (extra or {}).get(name, {}))
    return rows


def _median_above(taken: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(map(sub, taken, base))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``call`` held at once."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    now = peak = 0
    for change in allocations(call):
        now += change
        peak = max(peak, now)
    return peak


def allocations(call: Callable[[], Any]) -> list[int]:
    """Return the bytes that the CPU's allocator gave, or took back (negative), in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


OPTIONAL = {
    "above": "above module",
    "cpu": "CPU s",
    "cpu_of_module": "CPU / module's",
    "peak_bytes": "peak bytes",
    "kept_bytes": "kept bytes",
    "wrong": "wrong results",
}
"""Columns that not every question has."""


def record(question: str | None, axis: str, rows: list[Row], unit: str = "us") -> dict[str, Any]:
    """Print ``rows`` as a table, and return the record of a question."""
    title = (question or "").splitlines()[0]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in (axis, "contender", unit, "quartiles"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    others = {key: name for key, name in OPTIONAL.items() if rows[0].get(key) is not None}
    for column in ("torch.func / this", *others.values()):
        table.add_column(column, justify="right")
    last = None
    for row in rows:
        panel, last = ("" if row["panel"] == last else row["panel"]), row["panel"]
        cells = [panel, str(row["n"]), row["contender"], _figure(row["median"])]
        cells += [f"{_figure(row['low'])}-{_figure(row['high'])}"]
        cells += [_figure(row.get(key)) for key in ("ratio", *others)]
        table.add_row(*cells)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    return {"question": title, "axis": axis, "unit": unit, "rows": rows}


def store(name: str, record: dict[str, Any]) -> Path:
    """Write ``record`` with what it was measured on to ``perf/results/<name>.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**_measured_on(), **record}, indent=1) + "\n")
    return path


def run(name: str, main: Callable[..., dict[str, Any]]) -> None:
    """Ask one question as the command line says; what is quick is not stored."""
    parser = argparse.ArgumentParser(prog=f"python -m perf.{name}")
    parser.add_argument("--quick", action="store_true", help="rough figures, in seconds")
    parser.add_argument("--peers", action="store_true", help="with tensordict and JAX")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answer = main(**vars(options))
    if not options.quick:
        print(f"-> {store(name, answer)}")


def _measured_on() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
    }


def _seconds(call: Callable[[], Any], count: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def difference(result: Any, reference: Any) -> float:
    """Return the largest difference of two nests of tensors, or of arrays, relative to each."""
    ours, theirs = map(_tensors, (result, reference))
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ValueError("contenders returned results of different shapes")
    return max(
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-3))
        for one, other in zip(ours, theirs)
    )


def _tensors(nest: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(nest) if leaf is not None]
    made = [leaf if isinstance(leaf, Tensor) else torch.tensor(leaf.tolist()) for leaf in leaves]
    return [tensor.detach().double().cpu() for tensor in made]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
