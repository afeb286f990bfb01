"""How long does it take to compile, and how does that grow with parameters and with calls?

Nothing is taken from caches on disk, but for the last panels: first calls in processes of their
own, without and with what an earlier one left on disk (torch's own caches, and the folder of
``fcall.compile``). Imports are not counted. Beside the time that passes, which the C++ compiler and
whatever else runs on the machine make unsteady, stands the processors' time: of this process, and
of those that it started.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf import bench
from perf.models import CALLS, backend, encoder, mlp, random, weights_for, with_weights

LAYERS = (6, 36, 144)
ENCODER_LAYERS = (2, 6)
CALLS_IN_GRAPH = (1, 5, 20)
FROM_DISK = 144
ROUNDS = 3


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    for layers in (2,) if quick else LAYERS:
        module, x = mlp(*[8] * (layers + 1)), random(4, 8)
        rows += _rows(module, x, 1, "one call; n: parameters", 2 * layers, quick)
    for layers in () if quick else ENCODER_LAYERS:
        panel = "one call of a transformer encoder; n: layers"
        rows += _rows(encoder(layers), random(2, 5, 32), 1, panel, layers, quick)
    for calls in (2,) if quick else CALLS_IN_GRAPH:
        layers = 1 if quick else 6
        panel = f"{2 * layers} parameters; n: calls in one graph"
        module, x = mlp(*[8] * (layers + 1)), random(4, 8)
        rows += _rows(module, x, calls, panel, calls, quick)
    if not quick:
        rows += _rows_of_processes(FROM_DISK, ROUNDS)
    return bench.record(__doc__, "n", rows, unit="s")


def _rows_of_processes(layers: int, rounds: int) -> list[bench.Row]:
    """Measure first calls in processes of their own: the first fills a folder, the second reads."""
    taken: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
    for _ in range(rounds):
        for name in ("module, compiled", "torch.func, compiled", "fcall.compile"):
            with tempfile.TemporaryDirectory() as folder:
                code = f"from perf import compile_time as c; c.in_process({name!r}, {layers})"
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                for times in taken.values():
                    run = [sys.executable, "-W", "ignore", "-c", code]
                    out = subprocess.run(run, env=environment, stdout=subprocess.PIPE, check=True)
                    times.setdefault(name, []).append(float(out.stdout.split()[-1]))
    rows = []
    for start, times in taken.items():
        panel = f"{start} start of a process; n: parameters"
        rows += bench.rows_of(times, panel=panel, n=2 * layers)
    return rows


def in_process(name: str, layers: int) -> None:
    """Print the seconds that a first call takes in this process, with what is on disk."""
    module, x = mlp(*[8] * (layers + 1)), random(4, 8)
    weights = weights_for(module)
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "module, compiled": lambda: torch.compile(lambda weights, x: module(x)),
        "torch.func, compiled": lambda: torch.compile(
            lambda weights, x: CALLS["torch.func"](module, weights, (x,))
        ),
        "fcall.compile": lambda: fcall.compile(
            module, cache=os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "fcall")
        ),
    }
    torch.compile(lambda x: x + 1)(x)  # imports the compiler, and asks what the CPU can do
    with torch.no_grad():
        start = time.perf_counter()
        makers[name]()(weights, x)
        print(time.perf_counter() - start)


def _rows(
    module: nn.Module, x: Tensor, calls: int, panel: str, n: int, quick: bool
) -> list[bench.Row]:
    weights = weights_for(module)
    twin = with_weights(module, weights).requires_grad_(False)  # as the weights: torch asks for it
    compile = partial(torch.compile, fullgraph=True, backend=backend(quick))

    def calling(call: Callable[..., Any]) -> Callable[..., Any]:
        def fn(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            for _ in range(calls):
                x = call(module, weights, (x,))
            return x

        return fn

    def module_alone() -> Callable[..., Any]:
        if calls > 1:
            return compile(calling(lambda module, weights, args: twin(*args)))
        compiled = compile(twin)
        return lambda weights, x: compiled(x)

    contenders: dict[str, Callable[[], Callable[..., Any]]] = {
        "module, compiled": module_alone,
        **{f"{name}, compiled": partial(compile, calling(call)) for name, call in CALLS.items()},
    }
    if calls == 1:
        contenders["fcall.compile"] = lambda: fcall.compile(module, backend=backend(quick))
    # The first time imports the compiler.
    outs = {name: _first_call(make(), weights, x)[0] for name, make in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    computed: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2 if quick else ROUNDS):
        for name, make in contenders.items():
            _, seconds, of_processors = _first_call(make(), weights, x)
            taken[name].append(seconds)
            computed[name].append(of_processors)
    expected, least = outs["module, compiled"], computed["module, compiled"]
    extra = {
        name: {
            "cpu": statistics.median(computed[name]),
            "cpu_of_module": statistics.median(map(truediv, computed[name], least)),
            "off_by": bench.difference(out, expected),
        }
        for name, out in outs.items()
    }
    return bench.rows_of(taken, panel=panel, n=n, extra=extra)


def _first_call(
    fn: Callable[..., Any], weights: dict[str, Tensor], x: Tensor
) -> tuple[Any, float, float]:
    """Return the output, and the seconds that passed, and that processors were at work."""
    torch.compiler.reset()
    gc.collect()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        start, start_of_cpu = time.perf_counter(), _cpu_seconds()
        out = fn(weights, x)
        return out, time.perf_counter() - start, _cpu_seconds() - start_of_cpu


def _cpu_seconds() -> float:
    """Return the time of processors that this process, and those it waited for, have used."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    bench.run("compile_time", main)
