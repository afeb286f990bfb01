"""Time per call, for contenders that share a machine with other work."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

REPEATS = 15


@dataclass(frozen=True)
class Milliseconds:
    """Time of one call: the median over the repeats and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float


def interleaved(
    routes: Mapping[str, Callable[[], object]], repeats: int = REPEATS
) -> dict[str, Milliseconds]:
    """Time each route `repeats` times, one call of each in turn, after two calls to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(repeats + 2):
        for name, call in routes.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Milliseconds:
    lower, median, upper = statistics.quantiles(values, n=4)
    return Milliseconds(median, lower, upper)
