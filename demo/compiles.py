"""What Dynamo compiled, read from its own counters."""

from dataclasses import dataclass

from torch._dynamo.utils import counters, get_compilation_metrics


@dataclass(frozen=True)
class Compiles:
    """Graphs handed to a backend, and frames compiled again because a guard failed."""

    graphs: int
    recompiles: int

    def __sub__(self, earlier: "Compiles") -> "Compiles":
        return Compiles(self.graphs - earlier.graphs, self.recompiles - earlier.recompiles)


def so_far() -> Compiles:
    """The counts of this process; take two and subtract."""
    # The list of metrics keeps the last 64 compilations; the demo makes a handful.
    return Compiles(
        graphs=counters["stats"]["unique_graphs"],
        recompiles=sum(1 for metric in get_compilation_metrics() if metric.recompile_reason),
    )
