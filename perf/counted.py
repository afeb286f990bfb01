"""What calls cost in things that can be counted: the same on any machine, however busy."""

from __future__ import annotations

import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from operator import sub
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._guards import Guard
from torch._inductor import metrics

import fcall
from perf.compiled_call import Sum
from perf.eager_call import another_thread
from perf.models import linears, mlp, weights_for
from perf.timing import DEVICE, allocations

Counts = dict[str, float]


def eager() -> Counts:
    """An eager call, above the call of the module itself."""
    found: Counts = {}
    bytecodes_of = {}
    for count in (72, 288):
        module, x = linears(count // 2), torch.ones(1, 2, device=DEVICE)
        weights = weights_for(module)
        call = partial(fcall.functional_call, module, weights, (x,))
        bytecodes_of[count] = bytecodes(call) - bytecodes(partial(module, x))
        found[f"eager, {count} parameters: bytecodes"] = bytecodes_of[count]
        c_calls = calls_of_c(call) - calls_of_c(partial(module, x))
        found[f"eager, {count} parameters: calls of C"] = c_calls
    growth = (bytecodes_of[288] - bytecodes_of[72]) / (288 - 72)
    found["eager: bytecodes for one more parameter"] = growth
    found["eager, 288 parameters: peak of Python's memory, bytes"] = python_memory(call)
    found["eager, 288 parameters: bytes of new tensors"] = made_bytes(call) - made_bytes(
        partial(module, x)
    )
    return found


def beside() -> Counts:
    """An eager call while another thread is alive, above the call of the module itself."""
    found: Counts = {}
    with another_thread():
        for count in (72, 288):
            module, x = linears(count // 2), torch.ones(1, 2, device=DEVICE)
            call = partial(fcall.functional_call, module, weights_for(module), (x,))
            found[f"eager, another thread alive, {count} parameters: bytecodes"] = bytecodes(
                call
            ) - bytecodes(partial(module, x))
    few, many = found.values()
    found["eager, another thread alive: bytecodes for one more parameter"] = (many - few) / 216
    return found


def compiled_call() -> Counts:
    """A call of what ``fcall.compile`` returns, once it is compiled."""
    found: Counts = {}
    for count in (72, 288):
        torch.compiler.reset()
        module, x = Sum(count), torch.ones(2, device=DEVICE)
        weights = weights_for(module)
        call = partial(fcall.compile(module, backend=_constant), weights, x)
        with torch.no_grad():
            found[f"fcall.compile, {count} parameters: bytecodes"] = bytecodes(call)
            found[f"fcall.compile, {count} parameters: calls of C"] = calls_of_c(call)
    found[f"fcall.compile, {count} parameters: bytes of new tensors"] = made_bytes(call)
    return found


def frames() -> Counts:
    """Six equal calls that differ in the kind and order of what holds the weights."""
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    module, x = mlp(3, 4, 2), torch.ones(2, 3, device=DEVICE)
    weights = weights_for(module)
    items = list(weights.items())
    call = fcall.compile(module, backend=counting)
    parameters = {name: nn.Parameter(w, requires_grad=False) for name, w in items}
    kinds = (weights, dict(reversed(items)), OrderedDict(items), parameters)
    for given in (*kinds, [dict(items[:2]), dict(items[2:])], (dict(items[:1]), dict(items[1:]))):
        call(given, x)
    return {"fcall.compile, 6 equal calls: graphs compiled": len(compilations)}


def compilation() -> Counts:
    """What Dynamo does to compile a call, above what it does for the module itself."""
    traced: dict[str, list[int]] = {}
    for layers in (6, 36):
        for name, make in _to_be_compiled(layers).items():
            steps = calls_of(InstructionTranslatorBase, "step", make())
            traced.setdefault(name, []).extend((steps, calls_of(Guard, "create", make())))
    found: Counts = {"compiled module, 72 parameters: instructions traced": traced["module"][2]}
    for name in ("functional_call", "fcall.compile"):
        few, few_guards, many, guards = map(sub, traced[name], traced["module"])
        found[f"{name} compiled, 72 parameters: instructions traced, above the module's"] = many
        found[f"{name} compiled: instructions traced for one more parameter"] = (many - few) / 60
        found[f"{name} compiled, 72 parameters: guards made, above the module's"] = guards
        found[f"{name} compiled: guards made for one more parameter"] = (guards - few_guards) / 60
    return found


def _to_be_compiled(layers: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    module, x = mlp(*[8] * (layers + 1)), torch.ones(4, 8, device=DEVICE)
    weights = weights_for(module)
    compile = partial(torch.compile, backend="eager")
    ours = partial(fcall.functional_call, module)
    return {
        "module": lambda: partial(compile(module), x),
        "functional_call": lambda: partial(compile(ours), weights, (x,)),
        "fcall.compile": lambda: partial(fcall.compile(module, backend="eager"), weights, x),
    }


def calls_of(owner: type, method: str, call: Callable[[], Any]) -> int:
    """Return how often ``call`` calls a method when it has to compile."""
    torch.compiler.reset()
    own, count = getattr(owner, method), 0

    def counting(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        return own(self, *args)

    setattr(owner, method, counting)
    try:
        call()
    finally:
        setattr(owner, method, own)
    return count


def kernels() -> Counts:
    """What Inductor makes of a call, and of the plain module."""
    module, x = mlp(8, 8, 8), torch.ones(4, 8, device=DEVICE)
    weights = {name: w.requires_grad_() for name, w in weights_for(module).items()}
    contenders: dict[str, Callable[..., Any]] = {
        "the module": lambda _, x: module(x),
        "functional_call": lambda weights, x: fcall.functional_call(module, weights, (x,)),
    }
    made = {}
    for name, fn in contenders.items():
        torch.compiler.reset()
        metrics.reset()
        with torch.compiler.config.patch(force_disable_caches=True):
            torch.compile(fn, fullgraph=True)(weights, x).sum().backward()
        made[name] = metrics.generated_kernel_count, metrics.ir_nodes_pre_fusion
    plain, ours = made.values()
    return {
        "compiled: kernels above the module's": ours[0] - plain[0],
        "compiled: nodes above the module's": ours[1] - plain[1],
        "compiled module: kernels": plain[0],  # not 0, else nothing was counted
    }


def bytecodes(call: Callable[[], Any]) -> int:
    """Return how many Python instructions ``call`` executes once it is warm."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    _warm_up(call)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def calls_of_c(call: Callable[[], Any]) -> int:
    """Return how many functions written in C the Python code of ``call`` calls."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "c_call"

    _warm_up(call)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # the end of the profile


def python_memory(call: Callable[[], Any]) -> int:
    """Return the most bytes that objects of Python made by ``call`` took."""
    tracemalloc.start()
    try:
        _warm_up(call)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def made_bytes(call: Callable[[], Any]) -> int:
    """Return the bytes of all tensors that ``call`` makes."""
    _warm_up(call)
    return sum(max(change, 0) for change in allocations(call))


def _warm_up(call: Callable[[], Any]) -> None:
    for _ in range(3):
        call()


def _constant(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend without work of its own, so that the bytecodes are those of the call."""
    out = tuple(torch.zeros(2) for _ in graph.graph.output_node().args[0])
    return lambda *inputs: out


COUNTED = (eager, beside, compiled_call, frames, compilation, kernels)
"""Eager calls first: compilers start threads, and then values stand beside the module's own."""
