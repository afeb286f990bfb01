"""What one run of the demo measured, and whether it is what it should be."""

from dataclasses import dataclass

from demo.compiles import Compiles
from demo.times import Milliseconds

TOLERANCE = 1e-5
"""Largest difference allowed between two float32 embeddings of length 1, element by element."""


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: what it changes, and the largest differences from a deep copy with it."""

    moved: float
    """Largest difference of its embeddings from the pretrained ones; no check, it may be 0."""
    nearest_kept: int
    """Sentences whose nearest other sentence is the one the pretrained weights give."""
    compiled: float
    exported: float
    exported_other_batch: float


@dataclass(frozen=True)
class Export:
    """The exported program, as it came back from its file."""

    placeholders: list[str]
    user_inputs: int
    file_megabytes: float
    batch: int
    other_batch: int


@dataclass(frozen=True)
class Figures:
    """All that the page and the JSON file show."""

    model: str
    parameters: int
    buffers: int
    numbers: int
    uninitialised: list[str]
    route_weights: str
    """The weight set that the routes are compared and timed with."""
    routes: dict[str, float]
    """Largest difference of each way of calling from a deep copy with those weights."""
    milliseconds: dict[str, Milliseconds]
    weight_sets: dict[str, WeightSet]
    compiles: Compiles
    first_call_seconds: float
    module_changed: list[str]
    """Parameters and buffers of the called module that are not what they were; none should be."""
    export: Export
    nearest: list[int]
    cosines: list[float]

    def failures(self) -> list[str]:
        """One line for each figure that is not what fcall promises; empty when all is well."""
        differences = {f"route {name}": value for name, value in self.routes.items()}
        for name, weights in self.weight_sets.items():
            differences[f"{name} weights, compiled"] = weights.compiled
            differences[f"{name} weights, exported, batch {self.export.batch}"] = weights.exported
            differences[f"{name} weights, exported, batch {self.export.other_batch}"] = (
                weights.exported_other_batch
            )
        failures = [
            f"{what}: off by {value:.1e}, allowed {TOLERANCE:.0e}"
            for what, value in differences.items()
            if not value <= TOLERANCE  # so that a NaN fails too
        ]
        if self.compiles != Compiles(graphs=1, recompiles=0):
            failures.append(
                f"graphs compiled {self.compiles.graphs}, recompiles {self.compiles.recompiles}; "
                f"expected 1 and 0 for {len(self.weight_sets)} weight sets"
            )
        if self.export.user_inputs != len(self.export.placeholders):
            failures.append(
                f"only {self.export.user_inputs} of the exported graph's "
                f"{len(self.export.placeholders)} placeholders are user inputs"
            )
        if self.module_changed:
            failures.append(f"the module was left changed: {', '.join(self.module_changed)}")
        return failures
