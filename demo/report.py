"""The page on the screen and the figures in the JSON file."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from demo.errors import UsageError
from demo.figures import TOLERANCE, Figures

FIRST = 4
"""Placeholders of the exported graph to show."""


def show(figures: Figures, sentences: Sequence[str], path: Path) -> None:
    """Print the page on stdout, and where the JSON file is."""
    console = Console(highlight=False)
    console.print(page(figures, sentences))
    failures = figures.failures()
    verdict = (
        (f"{len(failures)} checks failed", "red")
        if failures
        else ("All agree, and the module is unchanged", "green")
    )
    console.print(Text.assemble("\n", verdict, f"; the figures are in {path}"), soft_wrap=True)


def page(figures: Figures, sentences: Sequence[str]) -> RenderableType:
    """The whole page, at most 80 columns wide."""
    name = Path(figures.model).resolve().name
    return Group(
        Text(f"\n{name}: a sentence encoder as a function of its weights", "bold"),
        Text(
            f"{figures.parameters} parameters ({figures.numbers:,} numbers), "
            f"{len(sentences)} sentences, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads"
        ),
        *_uninitialised(figures),
        _heading("One answer", f"with the {figures.route_weights} weights, called in four ways"),
        _routes(figures),
        _note("Timing is noisy: these are medians of interleaved calls, with their quartiles."),
        _heading("One graph", "largest difference from a deep copy that holds the weights"),
        _weight_sets(figures),
        _compiles(figures),
        _heading("Exported", "weights are inputs, and so is the batch size"),
        _export(figures),
        _heading("What it computes", "the nearest other sentence, with the pretrained weights"),
        _nearest(figures, sentences),
    )


def write_json(path: Path, figures: Figures, seed: int) -> None:
    """Write `figures`, and where they come from, to `path`."""
    text = json.dumps(as_json(figures, seed), indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): give --json a file") from error


def as_json(figures: Figures, seed: int) -> dict[str, Any]:
    """`figures` in the words of the JSON file; its keys are for reading by others, so keep them."""
    sets = figures.weight_sets.items()
    export = figures.export
    return {
        "model": figures.model,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "parameters": figures.parameters,
        "buffers": figures.buffers,
        "numbers": figures.numbers,
        "tolerance": TOLERANCE,
        "route_weights": figures.route_weights,
        "largest_difference": {
            "routes": figures.routes,
            "compiled": {name: weights.compiled for name, weights in sets},
            "exported": {name: weights.exported for name, weights in sets},
            "exported_other_batch": {name: weights.exported_other_batch for name, weights in sets},
            "from_pretrained": {name: weights.moved for name, weights in sets},
        },
        "graphs_compiled": figures.compiles.graphs,
        "recompiles": figures.compiles.recompiles,
        "module_changed": figures.module_changed,
        "first_compiled_call_seconds": figures.first_call_seconds,
        "milliseconds_per_call": {
            name: dataclasses.asdict(value) for name, value in figures.milliseconds.items()
        },
        "placeholders": len(export.placeholders),
        "first_placeholders": export.placeholders[:FIRST],
        "batch_sizes": [export.batch, export.other_batch],
        "exported_file_megabytes": export.file_megabytes,
        "failures": figures.failures(),
    }


def _heading(title: str, rest: str) -> Text:
    return Text.assemble("\n", (title, "bold cyan"), f"  {rest}")


def _note(text: str) -> Text:
    return Text(text, "dim")


def _table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = _bare_table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _bare_table() -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        header_style="dim",
    )


def _difference(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _uninitialised(figures: Figures) -> list[Text]:
    names = figures.uninitialised
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [Text(f"{len(names)} not in the checkpoint, drawn at random: {shown}", "yellow")]


def _routes(figures: Figures) -> Table:
    table = _table("call", "largest difference", "ms", "quartiles")
    for name, value in figures.routes.items():
        spent = figures.milliseconds[name]
        quartiles = f"{spent.lower_quartile:.1f} - {spent.upper_quartile:.1f}"
        table.add_row(name, _difference(value), f"{spent.median:.1f}", quartiles)
    return table


def _weight_sets(figures: Figures) -> Table:
    export = figures.export
    batches = f"exported, {export.batch}", f"exported, {export.other_batch}"
    table = _table("weights", "compiled", *batches, "from pretrained", "nearest kept")
    for name, weights in figures.weight_sets.items():
        differences = (
            weights.compiled,
            weights.exported,
            weights.exported_other_batch,
            weights.moved,
        )
        kept = f"{weights.nearest_kept} of {len(figures.nearest)}"
        table.add_row(name, *map(_difference, differences), kept)
    return table


def _compiles(figures: Figures) -> Text:
    graphs, again = figures.compiles.graphs, figures.compiles.recompiles
    return Text.assemble(
        (f"graphs compiled: {graphs}, recompiles: {again}", "bold"),
        f" (the first call took {figures.first_call_seconds:.1f} s)",
    )


def _export(figures: Figures) -> Text:
    export = figures.export
    first = "\n  ".join(export.placeholders[:FIRST])
    last = ", ".join(export.placeholders[-2:])
    return Text(
        f"{len(export.placeholders)} placeholders, {export.user_inputs} of them user inputs\n"
        f"saved without weights ({export.file_megabytes:.1f} MB), loaded, run with batches of "
        f"{export.batch} and {export.other_batch}\n"
        f"  {first}\n  ... {last}"
    )


def _nearest(figures: Figures, sentences: Sequence[str]) -> Table:
    table = _bare_table()
    table.add_column("sentence")
    table.add_column("nearest")
    table.add_column("cosine", justify="right")
    for sentence, index, cosine in zip(sentences, figures.nearest, figures.cosines, strict=True):
        table.add_row(sentence, sentences[index], f"{cosine:.2f}")
    return table
