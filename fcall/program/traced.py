"""How Dynamo traces a frame: with the weights standing in the module, put there all at once.

To trace :func:`fcall.functional_call` itself takes Dynamo longer than to trace a small module, for
it steps through each loop over the parameters. A frame needs none of its checks, which its caller
has done. So the frame calls an operator, for which Dynamo does by itself what the loops would do:
the variables that stand for the weights are put into those that stand for the module's dicts, and
taken out after the module was traced. What this cannot do is left to the other way, by tracing the
frame once more: modules that break the graph, delete a parameter, or reassign a tensor of their
own, and RNNs, parametrizations and plain attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fcall import _torch
from fcall.binding import Binding

__all__ = ["Placement", "substitute_op"]

dynamo = _torch.dynamo()
_Variable: Any = dynamo.TorchHigherOrderOperatorVariable

STORES = ("_parameters", "_buffers")


class Placement:
    """Where the weights of a frame go."""

    def __init__(self, binding: Binding, names: Sequence[str], index: Sequence[int]) -> None:
        self.is_possible = not binding.rnns and all(s.store in STORES for s in binding.slots)
        """Whether to trace :data:`substitute_op`, or ``functional_call``."""
        sources = zip(binding.slots, binding.sources)
        self.places = [(names[source], slot, index[source]) for slot, source in sources]
        """The name of each tensor that is put somewhere, its slot, and the number of the weight."""


class SubstituteOp(_torch.HigherOrderOperator):
    """A call of a body while weights stand in a module. Dynamo traces it, and emits no call of it.

    Equivalent to::

        def substitute_op(placement, body, module, weights):
            with substituted(module, {name: weights[n] for name, _, n in placement.places}) as s:
                out = body()
            return out, s.names_and_values_reassigned
    """

    def __init__(self) -> None:
        super().__init__("fcall_substitute")

    def __call__(
        self, placement: Placement, body: Callable[[], Any], module: nn.Module, weights: Any
    ) -> Any:
        raise AssertionError("this is to be traced, not called")


substitute_op = SubstituteOp()


class _SubstituteVariable(_Variable):
    """Traces a call of the operator."""

    _HOP_NAME = "fcall_substitute"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace ``substitute_op(placement, body, module, weights)``."""
        placement = args[0].realize().value
        try:
            return self._trace(tx, placement, *args[1:])
        except (dynamo.Unsupported, *dynamo.of_operations, _ImpossibleError) as error:
            placement.is_possible = False
            tx.speculation_log.clear()  # the next attempt goes another way from the start
            reason = "fcall: trace functional_call"
            raise dynamo.SpeculationRestartAnalysis(restart_reason=reason) from error

    def _trace(self, tx: Any, placement: Placement, body: Any, module: Any, weights: Any) -> Any:
        values = weights.realize().items
        swap = _Swap(tx, module.realize())
        with swap:
            for name, slot, number in placement.places:
                swap.put(name, slot, values[number].realize())
            out = body.call_function(tx, [], {})
        changed = [
            dynamo.TupleVariable([_Variable.build(tx, name), value])
            for name, value in swap.changed.items()
        ]
        return dynamo.TupleVariable([out, dynamo.TupleVariable(changed)])


class _ImpossibleError(Exception):
    """The module does what only ``functional_call`` can follow."""


class _Swap:
    """Variables put into those that stand for dicts of a module, and taken out at the end.

    Dynamo would replay the mutation of these dicts after each run of the graph. As they end up as
    they were, it is told to ignore it.
    """

    def __init__(self, tx: Any, module: Any) -> None:
        self.tx = tx
        self.owners = {"": module}
        self.stores: dict[tuple[str, str], _Store] = {}
        self.put_in: list[tuple[str, _Store, Any, Any]] = []
        self.changed: dict[str, Any] = {}
        """What the module reassigned, by name; known at the end."""

    def __enter__(self) -> _Swap:
        return self

    def put(self, name: str, slot: Any, value: Any) -> None:
        """Let ``value`` stand where the slot says."""
        place = (slot.path, slot.store)
        if place not in self.stores:
            self.stores[place] = _Store(self.tx, self._owner_at(slot.path), slot.store)
        store = self.stores[place]
        if slot.key not in store.keys:
            raise _ImpossibleError(f"{name} is not in its dict")
        key = store.keys[slot.key]
        self.put_in.append((name, store, key, value))
        store.items[key] = value

    def _owner_at(self, path: str) -> Any:
        if path not in self.owners:
            above, _, last = path.rpartition(".")
            self.owners[path] = _attribute(self.tx, self._owner_at(above), last)
        return self.owners[path]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, store, key, value in self.put_in:
            now = store.items.get(key)
            if now is not None and now.realize() is not value:
                self.changed[name] = now.realize()
            elif now is None and kind is None:
                kind, self.changed = _ImpossibleError, {}
        was_restored = [store.restore(self.put_in) for store in self.stores.values()]
        if kind is _ImpossibleError or (kind is None and not all(was_restored)):
            raise _ImpossibleError(
                "the module deletes, or reassigns, what it was given no value for"
            )


class _Store:
    """A dict of parameters or buffers, as Dynamo knows it."""

    def __init__(self, tx: Any, owner: Any, name: str) -> None:
        self.variable = _attribute(tx, owner, name)
        if not isinstance(self.variable, dynamo.ConstDictVariable):
            raise _ImpossibleError(f"{name} is no plain dict")
        self.items = self.variable.items
        self.before = dict(self.items)
        self.keys = {key.vt.as_python_constant(): key for key in self.items}
        self.side_effects = tx.output.side_effects
        self.side_effects.ignore_mutations_on(self.variable)

    def restore(self, put_in: Any) -> bool:
        """Put back what was there; return whether nothing else has changed."""
        self.side_effects.stop_ignoring_mutations_on(self.variable)
        own = {id(key) for _, store, key, _ in put_in if store is self}
        after = dict(self.variable.items)
        self.variable.items.clear()
        self.variable.items.update(self.before)
        return list(after) == list(self.before) and all(
            id(key) in own or after[key].realize() is value.realize()
            for key, value in self.before.items()
        )


def _attribute(tx: Any, owner: Any, name: str) -> Any:
    arguments = [owner, _Variable.build(tx, name)]
    return _Variable.build(tx, getattr).call_function(tx, arguments, {}).realize()


dynamo.variable_classes[substitute_op.__name__] = _SubstituteVariable
