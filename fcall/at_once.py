"""How Dynamo traces a call with the weights standing in the module, put there all at once.

For :data:`fcall.placement.substitute_op` Dynamo does by itself what :mod:`fcall.substitution` does
in loops: the variables that stand for the weights are put into those that stand for the module's
dicts, and taken out after the module was traced. What this cannot do is left to the loops, by
tracing the frame once more: modules that break the graph, or reassign or delete a tensor that they
were given no value for.

Imported at the first trace, since it needs all of Dynamo.
"""

from __future__ import annotations

from typing import Any

from fcall import _torch
from fcall.placement import Placement, substitute_op

__all__ = ["Placement", "placement_variable", "substitute_op"]

dynamo = _torch.dynamo()
_Variable: Any = dynamo.TorchHigherOrderOperatorVariable


def placement_variable(placement: Placement) -> Any:
    """Return what stands for a placement that was made while tracing."""
    return dynamo.UserDefinedObjectVariable(placement)


class _SubstituteVariable(_Variable):
    """Traces a call of the operator."""

    _HOP_NAME = "fcall_substitute"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace ``substitute_op(placement, body, module, weights)``."""
        placement = args[0].realize().value
        try:
            return self._trace(tx, placement, *args[1:])
        except (dynamo.Unsupported, *dynamo.of_operations, _ImpossibleError) as error:
            if placement.is_in_operator and not isinstance(error, _ImpossibleError):
                raise
            placement.is_possible = False
            tx.speculation_log.clear()  # the next attempt goes another way from the start
            reason = "fcall: trace the substitution as it is written"
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
            if name is not None
        ]
        return dynamo.TupleVariable([out, dynamo.TupleVariable(changed)])


class _ImpossibleError(Exception):
    """The module does what only the loops can follow."""


class _Swap:
    """Variables put into those that stand for dicts of a module, and taken out at the end.

    Dynamo would replay the mutation of these dicts after each run of the graph. As they end up as
    they were, it is told to ignore it.
    """

    def __init__(self, tx: Any, module: Any) -> None:
        self.tx = tx
        self.owners = {"": module}
        self.stores: dict[tuple[str, str], _Store] = {}
        self.put_in: list[tuple[str | None, _Store, Any, Any]] = []
        self.changed: dict[str | None, Any] = {}
        """What the module reassigned, by name; known at the end."""

    def __enter__(self) -> _Swap:
        return self

    def put(self, name: str | None, slot: Any, value: Any) -> None:
        """Let ``value`` stand where the slot says."""
        place = (slot.path, slot.store)
        if place not in self.stores:
            self.stores[place] = _Store(self.tx, self._owner_at(slot.path), slot.store)
        store = self.stores[place]
        if slot.key not in store.keys:
            raise _ImpossibleError(f"{slot.name} is not in its dict")
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
                self.changed[name] = now.realize()  # of what was deleted there is no successor
        was_restored = [store.restore(self.put_in) for store in self.stores.values()]
        if kind is _ImpossibleError or (kind is None and not all(was_restored)):
            raise _ImpossibleError("the module changes what it was given no value for")


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
        given = {key for _, store, key, _ in put_in if store is self}
        after = dict(self.variable.items)
        self.variable.items.clear()
        self.variable.items.update(self.before)
        own = [key for key in self.before if key not in given]
        return [key for key in after if key not in given] == own and all(
            after[key].realize() is self.before[key].realize() for key in own
        )


def _attribute(tx: Any, owner: Any, name: str) -> Any:
    arguments = [owner, _Variable.build(tx, name)]
    return _Variable.build(tx, getattr).call_function(tx, arguments, {}).realize()


dynamo.variable_classes[substitute_op.__name__] = _SubstituteVariable
