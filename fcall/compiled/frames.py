"""Frames: functions for Dynamo to compile, of weights that were put in one order before.

A frame is for one choice of slots, one build of the module, and weights of one kind each. It gets
the weights as a tuple: each tensor once, however many names it has, ordered by slot. So the order
and the number of the dicts, their kinds, and the names used for a tensor, leave no trace in the
compiled code.

Who calls a frame has checked what it is for: that its names lead to its slots, the module's hooks,
and that the weights are like those of the first call (:attr:`Frame.accepts`). So Dynamo's guards on
the same are left out, which would cost more than all the rest of a call, and take as long to make.
"""

from __future__ import annotations

import dis
import itertools
import re
import threading
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fcall import _torch
from fcall._torch import compiling
from fcall.binding import Binding
from fcall.call import functional_call
from fcall.compiled.record import Record
from fcall.compiled.structure import hooks_of, same_hooks
from fcall.compiled.weight_sets import WeightSets
from fcall.plan import binding_for, plan_for

__all__ = ["Compilation", "Compile", "Frame", "Names", "as_plain"]

Compile = Callable[[Callable[..., Any], bool, Record | None, bool], Callable[..., Any]]
"""Compiles a function. Whether who calls it has checked the weights and inputs; its record, if any;
whether CUDA graphs are to read its weights where they are."""

_numbers = itertools.count()

Result = tuple[Any, tuple[tuple[str, Tensor], ...]]
"""What a frame returns: the output, and what the module reassigned, by the names of the slots."""


class Names:
    """How the names that a call gives become the arguments of a frame."""

    def __init__(self, given: Sequence[str], binding: Binding) -> None:
        self.binding = binding
        order = sorted(range(len(binding.slots)), key=lambda i: binding.slots[i].name)
        self.slots = [binding.slots[i].name for i in order]
        """The names of the slots written, in order: the names that the frame uses."""
        sources = [binding.sources[i] for i in order]
        positions = {number: i for i, number in enumerate(dict.fromkeys(sources))}
        self.index = [positions[number] for number in sources]
        """For each slot, which of the weights goes there."""
        self.count = len(given)
        used = [given[number] for number in positions]
        self.same = [(group[0], other) for group in binding.same for other in group[1:]]
        """Pairs of names that need one tensor."""
        self.slot_of = {name: binding.slots[home].name for name, home in zip(given, binding.homes)}
        """The slot that each name given leads to."""
        get = itemgetter(*used) if used else None
        self.weights_of: Callable[[Any], tuple[Any, ...]] = (
            (lambda given: ()) if get is None else get if len(used) > 1 else lambda g: (get(g),)
        )
        """Takes the weights out of a dict, in order."""


class Frame:
    """A compiled function of weights, args and kwargs, for one choice of slots.

    With ``sets``, it has a twin: see :mod:`fcall.compiled.weight_sets`.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str | None,
        names: Names,
        weights: tuple[Tensor, ...],
        compile: Compile,
        record: Record | None = None,
        sets: WeightSets | None = None,
        is_static: bool = False,
    ) -> None:
        self.module, self.method, self.record = module, method, record
        self.sets, self.is_static = sets, is_static
        self.slots, self.index = names.slots, names.index
        self.binding = binding_for(module, tuple(self.slots), tie_weights=True, strict=False)
        self.hooks = hooks_of(module)
        self.accepts = compiling.compiled_calls().tensor_check(weights, [])
        slots, index = tuple(self.slots), tuple(self.index)
        from fcall.at_once import Placement, substitute_op

        targets = zip(self.binding.slots, self.binding.sources)
        places = [(slots[source], slot, index[source]) for slot, source in targets]
        placement = Placement(self.binding, places)

        @_torch.evaluated_while_tracing
        def at_once() -> bool:
            compiling.choose_guards_of_this_trace(self._needed)
            if placement.is_possible:  # else functional_call does the same
                _torch.allow_rnns_in_this_trace()
                _torch.give_zero_tangents_storage_in_this_trace()
            return placement.is_possible

        # A constant of the trace: no guards on hundreds of strings.
        @_torch.evaluated_while_tracing
        def numbered_slots() -> tuple[tuple[str, int], ...]:
            return tuple(zip(slots, index))

        def call(
            weights: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Result:
            if torch.compiler.is_dynamo_compiling() and at_once():
                target = module if method is None else getattr(module, method)
                result: Result = substitute_op(
                    placement, lambda: target(*args, **kwargs), module, weights
                )
                return result
            given = {}
            for name, number in numbered_slots():
                given[name] = weights[number]
            out = functional_call(module, given, args, kwargs, method=method)
            changed = {}
            for name, number in numbered_slots():
                if given[name] is not weights[number]:
                    changed[name] = given[name]
            return out, tuple(changed.items())

        # Dynamo keeps compilations, and gives up on too many, by code object; which sizes vary it
        # remembers by the name of the code, and would take those of other modules for ours.
        call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
        self._call = call
        cells = zip(call.__code__.co_freevars, call.__closure__ or ())
        self.scope = {name: cell.cell_contents for name, cell in cells}
        """What Dynamo's guards find in the frame besides its arguments."""
        self.breaks = False
        """Whether the last guarded call left nothing that can be called without Dynamo."""
        self.restored: list[Compilation] = []
        """Compilations by other processes."""
        self._compiled = compile(call, True, record, is_static)
        self._first_call = threading.RLock()
        self._was_called = False

    def __call__(
        self, weights: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Result:
        """Return the output, and the slots' names and tensors that the module reassigned."""
        if self._was_called:
            return self._compiled(weights, args, kwargs)  # type: ignore[no-any-return]
        with self._first_call:  # or each thread that comes while Dynamo compiles does so, too
            result: Result = self._compiled(weights, args, kwargs)
            self._was_called = True
            return result

    def takes(self, weights: Sequence[Tensor]) -> bool:
        """Whether these weights are for this frame, and not for its twin."""
        if self.sets is None:
            return True
        return self.sets.have(weights) if self.is_static else not self.sets.take(weights)

    def is_for(self, module: nn.Module, names: Names) -> bool:
        """Whether it is for these slots, and the module as it is built now."""
        return (
            self.slots == names.slots
            and self.index == names.index
            and same_hooks(self.hooks, hooks_of(module))
            and self.binding
            == binding_for(module, tuple(self.slots), tie_weights=True, strict=False)
        )

    def compilations(self) -> list[Compilation]:
        """Return what Dynamo has compiled, the latest used first, and what others have."""
        entries = compiling.compiled_calls().entries_of(self._call.__code__)
        count = len(self._call.__code__.co_freevars)
        compiled = [
            Compilation(guards, self.function(code, self._call.__globals__))
            for guards, code in entries
            if _is_one_graph(code) and len(code.co_freevars) == count
        ]
        return [*compiled, *self.restored]

    @property
    def code(self) -> CodeType:
        """What Dynamo compiles."""
        return self._call.__code__

    @property
    def globals(self) -> dict[str, Any]:
        """The globals of what Dynamo compiles: those of this file."""
        return self._call.__globals__

    def function(self, code: CodeType, globals: dict[str, Any]) -> FunctionType:
        """Return a function of what Dynamo compiled."""
        return FunctionType(code, globals, "call", None, self._call.__closure__)

    def _needed(self, guards: Sequence[Any], value_of: Callable[[Any], Any]) -> list[bool]:
        """Tell which of Dynamo's guards are needed, though a caller has checked the weights.

        Args:
            guards: Those of a trace of this frame, and of no other that is called in it.
            value_of: Returns what a guard is on, or None if that cannot be found.
        """
        module = self.module
        registered = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        plan = plan_for(module, tuple(self.slots), tie_weights=True, strict=False)
        substituted = {id(store.get(key, None)) for store, key in plan.entries}
        keep = []
        for guard in guards:
            source = _torch.source_of(guard)
            of_weight = _is_in(source, "weights")
            kind = guard.create_fn_name()
            if kind == "TYPE_MATCH" and WEIGHT.fullmatch(source):
                keep.append(False)  # a frame is traced with plain tensors; all that differs is that
            elif kind != "TENSOR_MATCH":
                is_checked = kind in CHECKED or _is_own(guard) or OWN_GLOBALS in source
                keep.append(not is_checked)
            elif of_weight:
                keep.append(False)
            elif _is_in(source, "args") or _is_in(source, "kwargs"):
                keep.append(True)
            else:
                known = id(value_of(guard))
                if known not in registered:
                    # A tensor from elsewhere, which may be one of the weights in another call: the
                    # guards against that are part of those on the weights.
                    return [True] * len(guards)
                keep.append(known not in substituted)
        return keep


def _is_own(guard: Any) -> bool:
    """Whether it is fcall's, that names lead to the same slots."""
    create = guard.create_fn
    is_always_needed = getattr(create, "is_always_needed", False)  # of dicts that others see else
    return getattr(create, "__module__", "").startswith("fcall.") and not is_always_needed


def _is_one_graph(code: CodeType) -> bool:
    """Whether compiled code needs Dynamo no more: after a graph break it calls what is not yet."""
    used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return "functional_call" not in used and any(n.startswith("__compiled_fn") for n in used)


WEIGHT = re.compile(r"L\['weights'\]\[\d+\]")
"""The source of a weight itself."""

CHECKED = {"AUTOGRAD_SAVED_TENSORS_HOOKS"}
"""Kinds of guards that take long, on what calls are checked for: ``is_plain`` of ``compiling``."""

OWN_GLOBALS = "['__import_fcall_dot_"
"""In the sources of fcall's own functions and constants, which stay as they are."""


def _is_in(source: str, variable: str) -> bool:
    return source.startswith(f"L['{variable}'][")


class Compilation:
    """One compilation of a frame: Dynamo's guards, and the code to be run where they hold."""

    __slots__ = (
        *("_begin", "_check", "_guards", "_is_unobserved", "_undo_transforms", "_unobserved"),
        "run",
    )

    def __init__(self, guards: Any, run: FunctionType) -> None:
        self._guards = guards
        self._check = guards.root.check
        calls = compiling.compiled_calls()
        self._is_unobserved, self._undo_transforms = calls.is_unobserved, calls.undo_transforms
        self._begin = calls.begin
        self.run, self._unobserved = run, calls.unobserved(run)

    def __call__(self, *inputs: Any) -> Any:
        """Run the code."""
        self._begin()
        try:
            return self._unobserved(*inputs) if self._is_unobserved() else self.run(*inputs)
        except BaseException:
            # As torch.compile does: the code enters transforms without try and finally.
            self._undo_transforms(0)
            raise

    def is_current(self) -> bool:
        """Whether it can be right for any frame."""
        return self._guards.cache_entry is not None

    def holds(self, scope: dict[str, Any]) -> bool:
        """Whether the code is right for a frame with these variables."""
        # Dynamo drops an entry when what its guards compare with by id is freed.
        return self._guards.cache_entry is not None and self._check(scope)


def as_plain(weight: Tensor, own: Collection[int]) -> Tensor:
    """Return a weight as another tensor object, where Dynamo would compile another time for it.

    That is for a ``Parameter``, and for a tensor of the module itself, by its id in ``own``.
    """
    if type(weight) is nn.Parameter:
        with torch.enable_grad():
            return weight.as_subclass(Tensor)
    if id(weight) in own and not weight.requires_grad:
        return weight.detach()
    return weight
