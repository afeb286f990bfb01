"""What does it cost to swap among K sets of weights, in time and in memory?

A call of a contender calls the model once with each of the sets. The sets themselves are there
before. What else a contender keeps is said by ``kept_bytes``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fcall
from perf import bench
from perf.models import CALLS, backend, mlp, random, weights_for, with_weights
from perf.peers import ask

SETS = (1, 4, 64)


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    width = 16 if quick else 128
    for count in SETS[1:2] if quick else SETS:
        torch.compiler.reset()
        module, x = mlp(*[width] * 7), random(4, width)
        sets = [weights_for(module) for _ in range(count)]
        own = {name: partial(call, module) for name, call in CALLS.items()}
        compile = partial(torch.compile, fullgraph=True, backend=backend(quick))
        rival: Callable[..., Any] = compile(lambda w, x, f=own["torch.func"]: f(w, (x,)))
        one_graph = fcall.compile(module, backend=backend(quick))
        copies = [with_weights(module, weights) for weights in sets]
        loaded = copy.deepcopy(module)

        def after_loading(weights: dict[str, Tensor], loaded: Any = loaded, x: Any = x) -> Any:
            loaded.load_state_dict(weights)
            return loaded(x)

        contenders: dict[str, Callable[[], Any]] = {
            "copies of the module": _each(copies, lambda m, x=x: m(x)),
            "load_state_dict": _each(sets, after_loading),
            **{n: _each(sets, lambda w, f=f, x=x: f(w, (x,))) for n, f in own.items()},
            "torch.func, compiled": _each(sets, lambda w, f=rival, x=x: f(w, x)),
            "fcall.compile": _each(sets, lambda w, f=one_graph, x=x: f(w, x)),
        }
        if peers:
            calls = [ask("tensordict", "eager", module, weights) for weights in sets]
            contenders["tensordict"] = _each(calls, lambda call, x=x: call["tensordict"](x))
        size = sum(p.nbytes for p in module.parameters())
        kept = {"copies of the module": count * size, "load_state_dict": size}
        with torch.no_grad():
            found = bench.measure(contenders, panel="weight sets", n=count, quick=quick)
        rows += [row | {"kept_bytes": kept.get(row["contender"], 0)} for row in found]
    return bench.record(__doc__, "weight sets", rows)


def _each(things: list[Any], call: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: [call(thing) for thing in things]


if __name__ == "__main__":
    bench.run("weight_sets", main)
