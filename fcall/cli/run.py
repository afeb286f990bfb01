"""``python -m fcall run``: a package on weights and inputs from files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcall import Runner, errors, load, open_state
from fcall.cli.show import CommandError, print_line, print_table, step

__all__ = ["add_to"]

EXAMPLE = """\
example:
  python -m fcall run encoder.pt2 --weights w.safetensors --input x.safetensors

where x.safetensors has a tensor for each input that `inspect` lists, by its name.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="run a package on weights and inputs from files",
        description="Run a package on weights and inputs from .safetensors files. A package is "
        "code: run those alone that you trust.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", metavar="FILE.pt2", help="what export wrote")
    parser.add_argument("--weights", metavar="FILE", help="the weights, by name")
    parser.add_argument("--prefix", default="", help="what to remove from their names")
    parser.add_argument("--input", metavar="FILE", help="the inputs, by name")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the outputs there; without it they are summarised",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.prefix and options.weights is None:
        raise CommandError("--prefix says what to remove from the names in --weights: give it")
    with step(f"loading {options.package}"):
        runner = load(options.package)
    weights = _tensors(options.weights, options.prefix, runner)
    args, kwargs = runner.signature.unflatten(_tensors(options.input, "", runner))
    with step(f"running {runner.signature.title}"), torch.no_grad():
        out = runner(weights, *args, **kwargs)
    outputs = dict(_named(out, ""))
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    if options.output is None:
        head = ("output", "shape", "dtype", "min", "mean", "max")
        print_table(head, [_summary(name, value) for name, value in tensors.items()])
    else:
        _save(tensors, Path(options.output))
        print_line(f"{options.output}: {', '.join(tensors)}")
    for name, value in outputs.items():
        if name not in tensors:
            print_line(f"{name} = {value!r}")
    changed = [spec.name for spec in runner.signature.weights if spec.changed]
    if changed:
        print_line(f"changed in memory alone: {', '.join(changed)}")


def _tensors(path: str | None, prefix: str, runner: Runner) -> dict[str, Tensor]:
    """Return the tensors in a file, on the device of the package."""
    if path is None:
        return {}
    device = torch.device(runner.environment["device"])
    return {name: value.to(device) for name, value in open_state(path, prefix=prefix).items()}


def _named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of an output: ``output``, ``output_0``, or the keys, joined by dots."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _named(part, f"{name or 'output'}_{i}")
    else:
        yield name or "output", value


def _summary(name: str, value: Tensor) -> tuple[str, ...]:
    head = (name, str(list(value.shape)), str(value.dtype).removeprefix("torch."))
    if not value.numel() or value.is_complex():
        return (*head, "", "", "")
    numbers = value.double()
    found = numbers.min(), numbers.mean(), numbers.max()
    return (*head, *[f"{number.item():.6g}" for number in found])


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        errors.fail(errors.MissingExtraError, "python -m fcall run --output", "safetensors", "cli")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: there is no folder {path.parent}")
    # Copies, as outputs may share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    save_file(copies, path)
