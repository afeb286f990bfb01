"""The fast route of a compiled call: its checks, then the code that Dynamo compiled.

A call through Dynamo costs 0.2 us a parameter for guards, and as much again in the compiled graph
for assertions. Here a call costs a fifth of that. All that could change its result is checked, in
this order; where a check fails the call takes the guarded route, through Dynamo.

=============================================  ==================================================
what could change                              where it is checked
=============================================  ==================================================
a trace or a transform of torch.func around    ``is_plain`` of ``compiling.compiled_calls``
the call, forward-mode AD, a dispatch mode,
hooks on saved tensors
``torch.compiler.set_stance``                  ``is_usual`` of ``compiling.compiled_calls``
the names given                                :attr:`Names.count` and ``weights_of``
tied names with different values               :attr:`Names.same`
class, dtype, device, sizes, strides and       ``_tensors``, torch's own check of tensors, on the
``requires_grad`` of each weight; inference    weights, what is kept of the module's own tensors,
mode; one tensor in two places                 and the inputs
what a name stands for, ties, submodules,      :class:`fcall.compiled.structure.Watch`
hooks
sizes of inputs, all other arguments,          Dynamo's guards, :meth:`Compilation.holds`: all but
attributes of the module, globals and          those on the weights and those on what ``Watch``
closures that it reads, its other tensors,     watches (``Frame._needed``)
grad mode, autocast, deterministic mode,
default dtype and device, threads, modes of
torch functions
what guards know by its id was freed; all      :meth:`Compilation.holds`; those read from disk,
compilations were reset                        guarded all the same, outlive a reset, unless they
                                               are recorded as CUDA graphs
the addresses of weights, for CUDA graphs      :class:`fcall.compiled.weight_sets.WeightSets`
=============================================  ==================================================

Nothing of a module is written in a fast call, but by code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcall import _torch
from fcall._torch import compiling
from fcall.compiled.frames import Compilation, Frame, Names
from fcall.compiled.structure import Watch

__all__ = ["MISS", "FastRoute", "tensors_in"]

MISS: Any = object()
"""In place of a result: the call has to take another route."""

PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
SIMPLE = frozenset({*PLAIN, Tensor, nn.Parameter})
OTHER_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


class FastRoute:
    """A way to call one frame, for one set of names and one class of each tensor."""

    def __init__(
        self,
        module: nn.Module,
        names: Names,
        frame: Frame,
        weights: Sequence[Tensor],
        kept: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> None:
        self.names = names
        kinds = [(type(t), t.dtype, t.device, t.dim(), t.requires_grad) for t in inputs]
        self.key = (frame, tuple(names.slot_of), [type(weight) for weight in weights], kinds)
        """What tells it from other routes of the same module."""
        self._weights_of = names.weights_of
        self._count = names.count
        self._kept = tuple(kept)
        self._input_count = len(inputs)
        calls = compiling.compiled_calls()
        self._is_plain, self._is_usual = calls.is_plain, calls.is_usual
        self._tensors = calls.tensor_check([*weights, *kept], inputs)
        self._unchanged = Watch(module).unchanged
        self._takes = None if frame.sets is None else frame.takes
        self._scope = frame.scope
        self._same = names.same
        self.compilations: list[Compilation] = []
        """What the frame has compiled, to be filled in."""

    def call(self, given: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output and the tensors that the module reassigned by slot, or :data:`MISS`."""
        if len(given) != self._count or not self._is_plain() or not self._is_usual():
            return MISS
        try:
            weights = self._weights_of(given)
        except KeyError:
            return MISS
        inputs = tensors_in(args, kwargs)
        if inputs is None or len(inputs) != self._input_count:
            return MISS
        if not self._tensors(*weights, *self._kept, *inputs) or not self._unchanged():
            return MISS
        for one, other in self._same:
            if given[one] is not given[other]:
                return MISS
        scope = {**self._scope, "weights": weights, "args": args, "kwargs": kwargs}
        for compilation in self.compilations:
            if compilation.holds(scope):
                # Last: it takes note of weights, which in a call that goes on would count twice.
                if self._takes is not None and not self._takes(weights):
                    return MISS
                return compilation(weights, args, kwargs)
        return MISS


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """Return the tensors among arguments, or None if there may be others out of sight."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.append(value)
        elif kind not in PLAIN:
            break
    else:
        return found
    leaves = _torch.pytree.tree_leaves((args, kwargs))
    if all(type(leaf) in SIMPLE or isinstance(leaf, OTHER_PLAIN) for leaf in leaves):
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return None
