"""Draws what is stored under perf/results/, for docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from perf.bench import FOLDER, RESULTS

ALL_RESULTS = Path(__file__).parent / "results"
ALL_IMAGES = Path(__file__).parents[1] / "docs" / "images"
IMAGES = ALL_IMAGES / FOLDER
STYLES = {"torch.func": "tab:orange", "fcall": "tab:blue", "module": "tab:gray"}


def main(results: Path = RESULTS, images: Path = IMAGES) -> list[Path]:
    """Draw each record: a panel for each of its panels, a line for each contender."""
    images.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "fcall", "svg.fonttype": "none", "font.size": 9})
    drawn = []
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        drawn.append(images / f"{path.stem}.svg")
        _draw(record, drawn[-1])
    return drawn


def _draw(record: dict[str, Any], path: Path) -> None:
    measured = [row for row in record["rows"] if "median" in row]
    panels = list(dict.fromkeys(row["panel"] for row in measured))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels) + 2, 3.4), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row["contender"] for row in measured))
    for axis, panel in zip(axes[0], panels):
        for number, name in enumerate(names):
            rows = [r for r in measured if (r["panel"], r["contender"]) == (panel, name)]
            if rows:
                _line(axis, name, number, rows)
        _, _, varied = panel.partition("n: ")
        axis.set(
            title=panel.partition("; n: ")[0],
            xlabel=varied or record["axis"],
            ylabel={"us": "microseconds", "s": "seconds"}[record["unit"]],
            xscale="log",
            yscale="log",
        )
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(record["question"], fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _line(axis: Any, name: str, number: int, rows: list[dict[str, Any]]) -> None:
    kind = name.partition(", ")[0]
    n = [row["n"] for row in rows]
    color = STYLES.get(kind, f"C{number + 2}")
    axis.plot(
        n,
        [row["median"] for row in rows],
        "--" if "compile" in name else "-",
        marker="o",
        markersize=3,
        color=color,
        label=name,
    )
    axis.fill_between(
        n, [row["low"] for row in rows], [row["high"] for row in rows], color=color, alpha=0.15
    )


if __name__ == "__main__":
    for folder in ("", "cuda"):  # those of another machine's device, too
        for path in main(ALL_RESULTS / folder, ALL_IMAGES / folder):
            print(path)
