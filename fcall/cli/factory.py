"""What ``export`` is given on the command line: a factory, sizes that vary, options."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import Dim

from fcall import Program, errors
from fcall.cli.show import CommandError

__all__ = ["Call", "call_factory", "dynamic_shapes_of", "options_of"]


class Call(NamedTuple):
    """A call to trace."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_factory(name: str) -> Call | Program:
    """Import a function by ``"package.module:name"``, and call it."""
    factory = _imported(name)
    try:
        made = factory()
    except Exception as error:  # it is the user's code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        raise CommandError(f"{name}() raised {type(error).__name__}: {error} ({place})") from error
    if isinstance(made, Program):
        return made
    if isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        module, args, *more = made
        kwargs = more[0] if more else {}
        if isinstance(kwargs, Mapping):
            return Call(module, args if isinstance(args, tuple) else (args,), dict(kwargs))
    kinds = [type(v).__name__ for v in made] if isinstance(made, tuple) else type(made).__name__
    raise CommandError(
        f"{name}() has to return (module, args), (module, args, kwargs) or a fcall.Program, but "
        f"returned {kinds}"
    )


def _imported(name: str) -> Callable[[], Any]:
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise CommandError(f"{name!r} names no factory: expected package.module:function")
    try:
        found: Any = importlib.import_module(path)
    except Exception as error:  # it is the user's code
        raise CommandError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        known = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
        if not hasattr(found, part):
            raise CommandError(f"{path} has no {attribute!r}{errors.nearest(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"{name} is a {type(found).__name__}, and no function to call")
    function: Callable[[], Any] = found
    return function


def dynamic_shapes_of(call: Call, method: str | None, given: Sequence[str]) -> dict[str, Any]:
    """Return what ``x:0=batch:2:64`` and the like say, as ``torch.export`` takes it.

    An input inside of an argument is named with dots, as ``more.y``.
    """
    sizes: dict[str, dict[int, Any]] = {}
    dims: dict[str, tuple[str, Any]] = {}
    for text in given:
        match = re.fullmatch(r"([\w.]+):(\d+)=([A-Za-z_]\w*)(?::(\d*))?(?::(\d*))?", text)
        if not match:
            raise CommandError(
                f"--dynamic {text}: expected INPUT:DIMENSION=NAME[:MIN[:MAX]], as in x:0=batch:2:64"
            )
        path, dimension, name, low, high = match.groups()
        limits = f"{low or ''}:{high or ''}"
        if name in dims and limits not in (":", dims[name][0]):
            raise CommandError(f"--dynamic {text}: {name} has other limits before: {dims[name][0]}")
        if name not in dims:
            dim = Dim(name, min=int(low) if low else None, max=int(high) if high else None)
            dims[name] = limits, dim
        sizes.setdefault(path, {})[int(dimension)] = dims[name][1]
    target = getattr(call.module, method or "forward")
    arguments = inspect.signature(target).bind(*call.args, **call.kwargs).arguments
    known: dict[str, int] = {}
    shapes = {name: _shapes(value, name, sizes, known) for name, value in arguments.items()}
    for path, by_dimension in sizes.items():
        if path not in known:
            near = errors.nearest(path, known)
            raise CommandError(f"--dynamic {path}: no such tensor{near}; there are {list(known)}")
        if max(by_dimension) >= known[path]:
            count = known[path]
            raise CommandError(f"--dynamic {path}:{max(by_dimension)}: it has {count} dimensions")
    return shapes


def _shapes(value: Any, path: str, sizes: Mapping[str, Any], known: dict[str, int]) -> Any:
    if isinstance(value, Tensor):
        known[path] = value.dim()
        return sizes.get(path)
    if isinstance(value, Mapping):
        return {key: _shapes(v, f"{path}.{key}", sizes, known) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        found = [_shapes(v, f"{path}.{i}", sizes, known) for i, v in enumerate(value)]
        return found if isinstance(value, list) else tuple(found)
    return None


def options_of(given: Sequence[str]) -> dict[str, Any]:
    """Return what ``KEY=VALUE`` says; values are as in Python, or text."""
    options = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise CommandError(f"--options {text}: expected KEY=VALUE, as in max_autotune=True")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = {"true": True, "false": False}.get(value, value)
    return options
