"""What all have in common that are called with weights, then inputs, and run a graph on them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from fcall import errors
from fcall.given import Weights, merge, write_back
from fcall.program.signature import Signature
from fcall.state import State, open_state

__all__ = ["GraphCall", "WeightsOrPath"]

Path = str | os.PathLike[str]
WeightsOrPath = Weights | Path | Sequence[Mapping[str, Tensor] | Path]
"""Values by name, where a path stands for the mapping that :func:`fcall.open_state` makes of it."""


class GraphCall:
    """A graph with a signature, and with values for weights that may be left out."""

    def __init__(self, signature: Signature, defaults: Mapping[str, Tensor]) -> None:
        self.signature = signature
        """What the graph takes."""
        self.defaults = dict(defaults)
        """Values for the names that may be left out. Never written to."""
        self._written = [
            spec.name
            for spec in signature.inputs
            if spec.has_default and spec.changed == "in place"
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights, in the order of their placeholders."""
        return self.signature.names

    def _opened(self, weights: WeightsOrPath) -> Weights:
        """Return the values by name, with those on disk in place of paths."""
        if isinstance(weights, (str, os.PathLike)):
            return self._on_disk(weights)
        if isinstance(weights, (list, tuple)):
            return [
                self._on_disk(part) if isinstance(part, (str, os.PathLike)) else part
                for part in weights
            ]
        return cast("Weights", weights)

    def _on_disk(self, path: Path) -> State:
        """Open a file for one call, in which what the graph changes would be lost."""
        state = open_state(path)
        changed = [spec for spec in self.signature.weights if spec.changed]
        lost = [name for spec in changed for name in spec.names if name in state]
        if lost:
            errors.fail(errors.ReadOnlyMappingError, lost[0], State.__name__)
        return state

    def _flatten(
        self, dicts: Weights, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Any]:
        """Return the inputs of the graph, checked."""
        copies = {name: self.defaults[name].clone() for name in self._written}
        defaults = {**self.defaults, **copies} if copies else self.defaults
        return self.signature.flatten(merge(dicts), args, kwargs, defaults)

    def _write_back(self, dicts: Weights, state: Mapping[str, Tensor]) -> None:
        """Replace what the module reassigned, under all names that it was given by."""
        if state:
            names = self.signature.given_names(merge(dicts))
            pairs = [(name, value) for key, value in state.items() for name in names[key]]
            changed = dict(enumerate([value for _, value in pairs]))
            write_back(dicts, [name for name, _ in pairs], changed)

    def __repr__(self) -> str:
        kind = type(self).__name__
        inputs = [f"  {spec.placeholder}: {spec}" for spec in self.signature.inputs]
        return "\n".join([f"{kind} of {self.signature.title}(", *inputs, ")"])
