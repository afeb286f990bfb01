"""The device at hand, and what time and memory a call takes there."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr when it starts

import torch

Contenders = Mapping[str, Callable[[], Any]]
"""What to call, by name."""


def device(name: str) -> torch.device:
    """Return the device called ``name``; of an empty name, the GPU if there is one."""
    there = torch.cuda.is_available()
    if name not in ("", "cpu", "cuda"):
        raise SystemExit(f"perf: the device is cpu or cuda, not {name!r}")
    if name == "cuda" and not there:
        build = torch.version.cuda and f"for CUDA {torch.version.cuda}"
        raise SystemExit(
            "perf: cuda was asked for, but torch sees no CUDA device: "
            f"torch {torch.__version__} was built {build or 'without CUDA'}"
        )
    return torch.device(name or ("cuda" if there else "cpu"))


DEVICE = device(os.environ.get("PERF_DEVICE", ""))

WAITS: list[Callable[[], Any]] = []
"""What waits for work that goes on after a call has returned. Other libraries add theirs."""

if DEVICE.type == "cuda":
    WAITS.append(torch.cuda.synchronize)
    # As products of matrices are by default: what is compared is float32, for all contenders.
    torch.backends.cudnn.allow_tf32 = False


def wait() -> None:
    """Return once all is done that was asked of the device."""
    for each in WAITS:
        each()


def interleaved(contenders: Contenders, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return for each of ``contenders`` its times, in microseconds, one for each round."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(2):
            call()
        calls[name] = max(1, round(seconds / seconds_of(call, 1)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            taken[name].append(seconds_of(call, calls[name]) / calls[name] * 1e6)
    return taken


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Return what ``count`` calls in a row take, until the device has done their work."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - start


def host_us(call: Callable[[], Any], rounds: int) -> float:
    """Return the microseconds until a call returns, with nothing in the device's queue before it.

    They are the host's own: only where a call fills the queue, or asks for a value, does it wait.
    """
    taken = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    wait()
    return statistics.median(taken) * 1e6


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``call`` held at once."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    now = peak = 0
    for change in allocations(call):
        now += change
        peak = max(peak, now)
    return peak


def allocations(call: Callable[[], Any]) -> list[int]:
    """Return the bytes that the CPU's allocator gave, or took back (negative), in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
