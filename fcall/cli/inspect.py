"""``python -m fcall inspect``: what a package takes, and where it runs, without running it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fcall import PackageInfo, Signature, package_info
from fcall.cli.show import human_size, print_line, print_table

__all__ = ["add_to", "print_inputs"]

EXAMPLE = """\
example:
  python -m fcall inspect encoder.pt2
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="tell what a package takes, and where it runs",
        description="Tell what a package takes, and where it runs. Its digests are verified; none "
        "of its code is run.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", metavar="FILE.pt2", help="what export wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=inspect)


def inspect(options: argparse.Namespace) -> None:
    """Run the command."""
    info = package_info(options.package)
    if options.json:
        print_line(json.dumps(_as_json(info), indent=2))
        return
    print_line(f"{info.path}: {info.signature.title}, {human_size(info.size)}, digests verified")
    print_line(f"made by fcall {info.version}")
    for key, value in info.environment.items():
        print_line(f"{key}: {' '.join(value) if isinstance(value, list) else value}")
    print_line("")
    print_inputs(info.signature)


def print_inputs(signature: Signature) -> None:
    """Print the inputs as a table, and the limits of sizes that vary."""
    head = ("name", "kind", "shape", "dtype", "device", "tied to", "changed", "default")
    print_table(head, [_row(spec) for spec in signature.inputs])
    for name, (low, high) in signature.ranges.items():
        limit = "or more" if high is None else f"to {high}"
        print_line(f"{name}: {low} {limit}")


def _row(spec: Any) -> tuple[str, ...]:
    if spec.kind == "constant":
        return spec.name, "constant", f"= {spec.value!r}", "", "", "", "", ""
    return (
        spec.name,
        spec.kind,
        str(list(spec.shape)).replace("'", ""),
        str(spec.dtype).removeprefix("torch."),
        str(spec.device),
        ", ".join(spec.tied),
        spec.changed,
        "yes" if spec.has_default else "",
    )


def _as_json(info: PackageInfo) -> dict[str, Any]:
    record = info.signature.to_json()
    return {
        "path": str(info.path),
        "size": info.size,
        "digests": "verified",
        "fcall": info.version,
        "environment": dict(info.environment),
        "title": record["title"],
        "inputs": record["inputs"],
        "ranges": record["ranges"],
    }
