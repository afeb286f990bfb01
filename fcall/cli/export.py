"""``python -m fcall export``: trace what a factory makes, and write a package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fcall import Program, errors, open_state, package, trace
from fcall.cli.factory import Call, call_factory, dynamic_shapes_of, options_of
from fcall.cli.inspect import print_inputs
from fcall.cli.show import CommandError, human_size, print_line, step
from fcall.prefixes import fitting_prefix

__all__ = ["add_to"]

EXAMPLE = """\
example:
  python -m fcall export my.models:encoder encoder.pt2 --dynamic x:0=batch:2:512

where my/models.py has

  def encoder():
      return Encoder(), (torch.rand(8, 3),)
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="trace a module, and write a package",
        description="Trace a module's call, and compile it to a package that takes its weights.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (module, args), (module, args, kwargs), or "
        "a fcall.Program",
    )
    parser.add_argument("output", metavar="OUT.pt2", help="the file to write")
    parser.add_argument("--method", help="the method to trace; by default the module's call")
    parser.add_argument(
        "--dynamic",
        metavar="INPUT:DIM=NAME[:MIN[:MAX]]",
        nargs="+",
        action="extend",
        default=[],
        help="a dimension that varies; the same name means the same size",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="take the example values from a .safetensors file, in place of the module's own",
    )
    parser.add_argument("--prefix", default="", help="what to remove from the names in that file")
    parser.add_argument(
        "--bake-rest",
        action="store_true",
        help="make constants of what --weights has no values for; without --weights, of all",
    )
    parser.add_argument(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="settings of Inductor",
    )
    parser.set_defaults(command=export)


def export(options: argparse.Namespace) -> None:
    """Run the command."""
    if not options.output.endswith(".pt2"):
        errors.fail(errors.PackageNameError, options.output)
    settings = options_of(options.options)
    made = call_factory(options.factory)
    if isinstance(made, Program):
        only_for_modules = ("method", "dynamic", "weights", "prefix", "bake_rest")
        given = [f"--{name.replace('_', '-')}" for name in only_for_modules if vars(options)[name]]
        if given:
            raise CommandError(
                f"{options.factory} returns a Program, for which {given} say nothing"
            )
        program = made
    else:
        program = _traced(made, options)
    start = time.monotonic()
    with step(f"compiling {program.signature.title}"):
        try:
            path = package(program, options.output, options=settings)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise _failed("compiling", error) from error
    seconds = time.monotonic() - start
    size = human_size(path.stat().st_size)
    print_line(f"{path}: {program.signature.title}, {size}, compiled in {seconds:.1f} s")
    print_inputs(program.signature)


def _traced(call: Call, options: argparse.Namespace) -> Program:
    if options.method is not None and not callable(getattr(call.module, options.method, None)):
        known = dir(type(call.module))
        errors.fail(errors.UnknownMethodError, type(call.module).__name__, options.method, known)
    shapes = dynamic_shapes_of(call, options.method, options.dynamic) if options.dynamic else None
    weights = _examples(call.module, options)
    with step(f"tracing {type(call.module).__name__}"):
        try:
            return trace(
                call.module,
                weights,
                call.args,
                call.kwargs,
                dynamic_shapes=shapes,
                method=options.method,
                bake_rest=options.bake_rest,
            )
        except errors.FcallError:
            raise
        except Exception as error:  # of the user's forward
            raise _failed("tracing", error) from error


def _examples(module: nn.Module, options: argparse.Namespace) -> Mapping[str, Tensor]:
    if options.weights is None:
        if options.prefix:
            raise CommandError("--prefix says what to remove from the names in --weights: give it")
        if options.bake_rest:
            return {}
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = open_state(options.weights, prefix=options.prefix)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = [*parameters, *dict(module.named_buffers(remove_duplicate=False))]
    unknown = [name for name in state if name not in known]
    if unknown:
        prefix = fitting_prefix(state.keys(), known)
        prefix = options.prefix + prefix if prefix else ""
        title = type(module).__name__
        errors.fail(errors.UnexpectedWeightsError, title, unknown, known, prefix)
    return state


def _failed(what: str, error: Exception) -> Exception:
    if isinstance(error, errors.FcallError):
        return error
    return CommandError(f"{what} failed: {type(error).__name__}: {error}")
