"""The command line, ``python -m fcall``: write a package, look into it, run it.

It ends with 0 if all went well, 1 for a mistake in what it was given, which it tells in one line,
and 2 if it was not called as its help says.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from fcall import errors
from fcall.cli import export, inspect, run
from fcall.cli.show import CommandError, in_one_line

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # torch.export copies specs through a class that torch has deprecated.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            options.command(options)
    except (errors.FcallError, CommandError, OSError) as error:
        sys.stderr.write(f"python -m fcall: {in_one_line(error)}\n")
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, whose result has a ``command`` to call with it."""
    parser = argparse.ArgumentParser(
        prog="python -m fcall",
        description="Compile a module to a file that takes its weights, look into it, and run it.",
        epilog="`python -m fcall COMMAND --help` has an example for each.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (export, inspect, run):
        command.add_to(commands)
    return parser
