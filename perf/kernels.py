"""Where the time of a call goes on the device: kernel by kernel, by torch's profiler.

It sees the kernels of all libraries in the process, on all streams. Without a GPU, operators take
the place of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from perf import table
from perf.timing import DEVICE, wait

CALLS = 3
SHOWN, KEPT = 12, 40

Kernel = dict[str, Any]
"""``name``; ``count`` and ``us``: how many there are in a call, and their time; ``share`` of it."""


def of(call: Callable[[], Any]) -> list[Kernel]:
    """Return the kernels of a call, those that take the most time first."""
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
        wait()
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: list[Kernel] = []
    for event in seen.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # An annotation spans kernels, whose time would be counted twice.
        if event.device_type == where and not event.is_user_annotation and us > 0:
            found.append({"name": event.key, "count": event.count / CALLS, "us": us / CALLS})
    total = device_us(found)
    kernels = [kernel | {"share": kernel["us"] / total} for kernel in found]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def device_us(kernels: Sequence[Kernel]) -> float:
    """Return the time of ``kernels`` on the device, without what passes between them."""
    return sum(kernel["us"] for kernel in kernels)


def show(title: str, kernels: Sequence[Kernel]) -> None:
    """Print the kernels that take the most time."""
    rows = [
        [k["name"][:100], table.figure(k["count"]), table.figure(k["us"]), f"{k['share']:.0%}"]
        for k in kernels[:SHOWN]
    ]
    table.show(title, ["kernel", "count", "us", "share"], rows, left=["kernel"])
