"""Where the weights of a traced call go, and the operator that puts them there at once.

To trace the loops of :mod:`fcall.substitution` takes Dynamo longer than to trace a small module: it
needs 20 us for an instruction of Python, and the loops have some 300 for each parameter. So where
it can, Dynamo does by itself what they would do, in :mod:`fcall.at_once`. Here is what both sides
know of it. Imported only where there can be operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fcall import _torch
from fcall.binding import Binding, Slot

__all__ = ["STORES", "Placement", "substitute_op"]

STORES = ("_parameters", "_buffers")


class Placement:
    """Where the weights of a call go.

    Args:
        binding: Where the names lead.
        places: What to call a tensor that the module puts into a slot, or None if nobody will ask
            for it; the slot; and the number of the weight that goes there.
        is_in_operator: Whether the call is the body of an operator, which looks after bodies that
            Dynamo cannot trace.
        placeholders: The names of the weights in the operator's graph.
    """

    def __init__(
        self,
        binding: Binding,
        places: Sequence[tuple[str | None, Slot, int]],
        *,
        is_in_operator: bool = False,
        placeholders: tuple[str, ...] = (),
    ) -> None:
        self.is_possible = not binding.rnns and all(s.store in STORES for s in binding.slots)
        """Whether to trace :data:`substitute_op`, or the substitution as it is written."""
        self.places = places
        self.is_in_operator = is_in_operator
        self.placeholders = placeholders


class SubstituteOp(_torch.HigherOrderOperator):
    """A call of a body while weights stand in a module. Dynamo traces it, and emits no call of it.

    Equivalent to::

        def substitute_op(placement, body, module, weights):
            values = {slot: weights[number] for _, slot, number in placement.places}
            with substituted(module, values) as s:
                out = body()
            return out, tuple((name, value) for name, value in s.reassigned if name is not None)
    """

    def __init__(self) -> None:
        super().__init__("fcall_substitute")

    def __call__(
        self, placement: Placement, body: Callable[[], Any], module: nn.Module, weights: Any
    ) -> Any:
        raise AssertionError("this is to be traced, not called")


substitute_op = SubstituteOp()
