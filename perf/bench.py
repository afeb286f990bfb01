"""Contenders side by side: interleaved, warmed up, synchronised, medians with quartiles.

A row of a record holds one contender at one size: the keys of :data:`Row`, in any question.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from operator import sub, truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perf import kernels, table
from perf.ceilings import Ceilings, Work
from perf.peers import Absent
from perf.timing import DEVICE, Contenders, host_us, interleaved, peak_bytes

FOLDER = "cuda" if DEVICE.type == "cuda" else ""
"""Where in the folders of results and of plots those of this device are."""
RESULTS = Path(os.environ.get("PERF_RESULTS") or Path(__file__).parent / "results" / FOLDER)
"""Where records are written: there, or in a folder of one's own, and then nothing is drawn."""

Row = dict[str, Any]
"""``panel`` and ``n``: where it was measured; ``contender``; ``median``, ``low``, ``high``: time a
call; ``ratio``: how many times the time of torch.func is its own; ``peak_bytes``: of new tensors,
at the worst moment of a call; ``off_by``: the largest relative difference of its results from those
of the first contender. Of some questions more: see :data:`OPTIONAL`. In place of figures there is
``absent`` or ``failed``: why there are none. Ratios of ``"X, compiled"`` and ``"fcall.compile"``
are to ``"torch.func, compiled"``."""

TAKEN_APART = ("module, compiled", "fcall.compile")
GAP = 0.2
"""Of which contenders the kernels are listed, where they are so far from the device's ceiling."""


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
    tolerance: float = 1e-3,
    work: Work | None = None,
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
        tolerance: A contender whose ``off_by`` is more has failed.
        work: What a call must do at least, to compare it with what the device can do.
    """
    start = time.perf_counter()
    extra, problems = _compared(contenders, tolerance)
    there = {name: contenders[name] for name in extra}
    if memory:  # nothing is seen of that of JAX
        for name, call in there.items():
            extra[name]["peak_bytes"] = peak_bytes(call) or None
    times = interleaved(there, rounds=3 if quick else rounds, seconds=0.001 if quick else seconds)
    rows = rows_of(times, panel=panel, n=n, above=above, extra=extra)
    if work:
        rows = [row | _beside(work, row, there[row["contender"]], quick) for row in rows]
    for name, problem in problems.items():
        rows.append({"panel": panel, "n": n, "contender": name, **problem})
    _keep(rows)
    taken = time.perf_counter() - start
    print(f"  {panel}, {n}: {len(there)} contenders in {taken:.0f} s", file=sys.stderr, flush=True)
    return rows


def _compared(
    contenders: Contenders, tolerance: float
) -> tuple[dict[str, Row], dict[str, dict[str, str]]]:
    """Call each once; return how far off those are that work, and why the others do not."""
    extra: dict[str, Row] = {}
    problems = {}
    reference = None
    for name, call in contenders.items():
        try:
            result = call()
        except Absent as error:
            problems[name] = {"absent": str(error)}
            continue
        except RuntimeError as error:  # of a compiler, or of memory: the others can be measured
            lines = str(error).strip().splitlines() or [""]
            problems[name] = {"failed": f"{type(error).__name__}: {lines[0]}"}
            continue
        reference = result if reference is None else reference
        off_by = difference(result, reference)
        extra[name] = {"off_by": off_by}
        if not off_by <= tolerance:
            extra[name]["failed"] = f"its results are off by {off_by:.2g}"
    return extra, problems


def _beside(work: Work, row: Row, call: Callable[[], Any], quick: bool) -> Row:
    """Return what is compared with the device's ceilings, and the kernels where it is far off."""
    found = work.rates(row["median"])
    taken_apart = row["contender"] in TAKEN_APART
    if DEVICE.type == "cpu" and not (quick and taken_apart):  # quick: to see that it runs
        return found
    found["host"] = host_us(call, 3 if quick else 10)
    of_call = kernels.of(call)
    found["device"] = kernels.device_us(of_call) or None
    if taken_apart and found["gap"] > GAP:
        found["kernels"] = of_call[: kernels.KEPT]
    return found


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
    base = times.get(above or "", ())
    rows = []
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        its = times.get("torch.func, compiled" if "compile" in name else "torch.func")
        row = {"panel": panel, "n": n, "contender": name}
        row |= {"median": median, "low": low, "high": high}
        if its is None or (above and not base):
            row["ratio"] = None
        elif above:
            own = row["above"] = _median_above(taken, base)
            row["ratio"] = _median_above(its, base) / own if own > 0 else None
        else:
            row["ratio"] = statistics.median(map(truediv, its, taken))
        rows.append(row | (extra or {}).get(name, {}))
    return rows


def _median_above(taken: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(map(sub, taken, base))


OPTIONAL = {
    "above": "above module",
    "cpu": "CPU s",
    "cpu_of_module": "CPU / module's",
    "host": "host us",
    "device": "device us",
    "tflops": "TFLOP/s",
    "tbytes": "TB/s",
    "bound": "ceiling",
    "gap": "gap to it",
    "peak_bytes": "peak bytes",
    "kept_bytes": "kept bytes",
    "wrong": "wrong results",
}
"""Columns that not every question has."""


def record(
    question: str | None,
    axis: str,
    rows: list[Row],
    unit: str = "us",
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """Print ``rows`` as a table, and return the record of a question."""
    title = (question or "").splitlines()[0]
    answer: dict[str, Any] = {"question": title, "axis": axis, "unit": unit, "rows": rows}
    others = {k: name for k, name in OPTIONAL.items() if any(r.get(k) is not None for r in rows)}
    columns = ["", axis, "contender", unit, "quartiles", "torch.func / this", *others.values()]
    table.show(title, columns, _cells(rows, ("ratio", *others)), left=("", "contender"))
    for row in rows:
        where = f"{row['panel']}, {row['n']}: {row['contender']}"
        for problem in row.keys() & {"absent", "failed"}:
            print(f"{problem}: {where}: {row[problem]}")
        if "kernels" in row:
            kernels.show(f"{where}, {row['gap']:.0%} from the ceiling", row["kernels"])
    if ceilings:
        answer["ceilings"] = ceilings.as_record()
        found = {name: table.figure(value) for name, value in answer["ceilings"].items()}
        print("The ceilings of the device, measured:", *map(" ".join, found.items()))
    return answer


def _cells(rows: Sequence[Row], keys: Sequence[str]) -> list[list[str]]:
    cells = []
    last = None
    for row in rows:
        panel, last = ("" if row["panel"] == last else row["panel"]), row["panel"]
        times = [table.figure(row.get(key)) for key in ("median", "low", "high")]
        place = [panel, str(row["n"]), row["contender"], times[0]]
        quartiles = "-".join(times[1:]) if "median" in row else ""
        cells.append([*place, quartiles, *(table.figure(row.get(key)) for key in keys)])
    return cells


def store(name: str, record: dict[str, Any]) -> Path:
    """Write ``record`` with what it was measured on to ``perf/results/<name>.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**_measured_on(), **record}, indent=1) + "\n")
    return path


_so_far: list[Path] = []
"""The file of what is measured of the question that is being asked."""


def _keep(rows: Sequence[Row]) -> None:
    for path in _so_far:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def kept_so_far(name: str) -> Iterator[None]:
    """Write rows as soon as there are any to ``<name>.so-far.jsonl``: a run can be cut off."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.so-far.jsonl"
    path.write_text(json.dumps(_measured_on()) + "\n")
    _so_far.append(path)
    try:
        yield
    finally:
        _so_far.remove(path)
    path.unlink()


def run(name: str, main: Callable[..., dict[str, Any]]) -> None:
    """Ask one question as the command line says; what is quick is not stored."""
    parser = argparse.ArgumentParser(prog=f"python -m perf.{name}")
    parser.add_argument("--quick", action="store_true", help="rough figures, in seconds")
    parser.add_argument("--peers", action="store_true", help="with tensordict and JAX")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        answer = main(**vars(options))
    else:
        with kept_so_far(name):
            answer = main(**vars(options))
            print(f"-> {store(name, answer)}")
    if any("failed" in row for row in answer["rows"]):
        sys.exit(1)


def _measured_on() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for peer in ("triton", "tensordict", "jax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[peer] = metadata.version(peer)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **versions,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
    }


def difference(result: Any, reference: Any) -> float:
    """Return the largest difference of two nests of tensors, or of arrays, relative to each."""
    ours, theirs = map(_tensors, (result, reference))
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ValueError("contenders returned results of different shapes")
    return max(
        float((one.to(other) - other).abs().max() / other.abs().max().clamp(min=1e-3))
        for one, other in zip(ours, (other.double() for other in theirs))
    )


def _tensors(nest: Any) -> list[Tensor]:
    """Return the tensors in ``nest``; of other libraries' arrays, tensors in their memory."""
    leaves = [leaf for leaf in pytree.tree_leaves(nest) if leaf is not None]
    made = [leaf if isinstance(leaf, Tensor) else torch.from_dlpack(leaf) for leaf in leaves]
    return [tensor.detach() for tensor in made]
