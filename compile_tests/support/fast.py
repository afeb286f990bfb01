"""Calls of what ``fcall.compile`` returns, with the routes they take."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import fresh, recording


def route_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, fcall.Route]:
    """Call ``fn``, and return its result and the route of the call."""
    with fcall.record_routes() as routes:
        out = fn(*args, **kwargs)
    (route,) = [route for route in routes if route.kind in ("fast", "guarded")]
    return out, route


def fast_call(module: nn.Module, *args: Any, **options: Any) -> tuple[Any, list[Any]]:
    """Return a compiled call whose next call with ``args`` is fast, and its list of graphs."""
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend, **options)
    fn(*fresh(args))
    assert route_of(fn, *fresh(args))[1] == fcall.Route(type(module).__name__, "fast", "")
    return fn, graphs


def readings(p: dict[str, Tensor]) -> list[Any]:
    """The same weights, given in the ways that torch.func compiles once more each."""
    names = list(p)
    return [
        p,
        {name: p[name] for name in reversed(names)},
        {name: nn.Parameter(value, requires_grad=False) for name, value in p.items()},
        collections.OrderedDict(p),
        types.MappingProxyType(p),
        fresh(p),
        [{name: p[name]} for name in names],
        tuple({name: p[name]} for name in reversed(names)),
    ]
