"""Compares what is counted with what is expected: ``make perf-check``. Times are never compared."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected was counted without a GPU

EXPECTED = Path(__file__).parent / "expected.json"

MARGIN = 0.1

OF_VERSIONS = (
    "bytecodes",
    "calls of C",
    "Python's memory",
    "compiled module: kernels",
    "instructions traced",
    "guards made",
)
"""Counts that differ between versions of Python and torch."""


def main(arguments: list[str] | None = None) -> int:
    """Count, print a table, and return 1 if something is not as expected."""
    parser = argparse.ArgumentParser(prog="python -m perf.check", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {EXPECTED.name} anew")
    options = parser.parse_args(arguments)
    found = _count()
    if options.update:
        written = {"counted with": _versions(), "margin": MARGIN, "counts": found}
        EXPECTED.write_text(json.dumps(written, indent=1) + "\n")
    expected = json.loads(EXPECTED.read_text())
    counted_with = expected["counted with"]
    skipped = []
    if counted_with != _versions():
        skipped = [name for name in found if any(part in name for part in OF_VERSIONS)]
    compared = {name: count for name, count in found.items() if name not in skipped}
    wanted = {name: c for name, c in expected["counts"].items() if name not in skipped}
    problems = differences(compared, wanted, expected["margin"])
    _show(found, expected["counts"], skipped)
    for problem in problems:
        print(f"perf-check: FAILED: {problem}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} not compared: they were counted with {counted_with}")
    if problems:
        print("If it is meant: python -m perf.check --update", file=sys.stderr)
    return bool(problems)


def differences(found: dict[str, float], expected: dict[str, float], margin: float) -> list[str]:
    """Return a line for each count that is off by more than the share ``margin`` of its value.

    Less than expected is a problem, too: later counts could grow by as much unseen.
    """
    problems = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            problems.append(f"{name}: {'not counted' if name in expected else 'not expected'}")
        elif abs(found[name] - expected[name]) > margin * abs(expected[name]):
            problems.append(f"{name}: {found[name]:g}, expected {expected[name]:g} +- {margin:.0%}")
    return problems


def _count() -> dict[str, float]:
    from perf.counted import COUNTED

    found: dict[str, float] = {}
    for count in COUNTED:
        found |= count()
    return found


def _versions() -> str:
    """Return what counts depend on: versions, without their last parts, and whether C is used."""
    from fcall.passes import IN_C

    versions = {"Python": platform.python_version(), "torch": metadata.version("torch")}
    texts = [f"{name} {'.'.join(v.split('.')[:2])}" for name, v in versions.items()]
    return ", ".join([*texts, f"passes in {'C' if IN_C else 'Python'}"])


def _show(found: dict[str, float], expected: dict[str, float], skipped: list[str]) -> None:
    from perf import table

    rows = []
    for name, count in found.items():
        wanted = f"{expected[name]:g}" if name in expected else ""
        rows.append([name, f"{count:g}", f"({wanted})" if name in skipped else wanted])
    table.show("", ["counted", "found", "expected"], rows, left=["counted"])


if __name__ == "__main__":
    sys.exit(main())
