"""How Dynamo resolves the names of a call, and checks what it is given: on the live module.

To trace that would take long, and would make inputs of all tensors of the module: replacing one
would compile anew, and so would giving the module's own tensors in one call, but not in the next.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from fcall import _torch, errors
from fcall.at_once import placement_variable
from fcall.binding import TENSORS, Binding, kept_on_meta
from fcall.operator.hop import bind_op, place_op
from fcall.operator.names import placeholder_name
from fcall.placement import Placement
from fcall.plan import binding_for
from fcall.scoped import own_dict

__all__ = ["BindVariable", "PlaceVariable", "known"]

dynamo = _torch.dynamo()
_Variable: Any = dynamo.TorchHigherOrderOperatorVariable


def known(tx: Any, what: str) -> dict[Any, Any]:
    """Return what is known of this frame: the calls to be ``"inlined"``, with their reasons, the
    ``"placements"`` of calls, some of which turned out not to be possible, and ``"guards"``.

    It is kept where Dynamo keeps what it learnt in earlier attempts at the same frame.
    """
    log = tx.speculation_log
    if not hasattr(log, "fcall_known"):
        log.fcall_known = {}
    return log.fcall_known.setdefault(what, {})  # type: ignore[no-any-return]


class BindVariable(_Variable):
    """Resolves names while tracing, and guards that the result stays the same."""

    _HOP_NAME = "fcall_bind"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace ``bind_op(bind, module, names, tie_weights, strict)``."""
        bind, module, *rest = [arg.realize() for arg in args]
        live = getattr(module, "value", None)
        if not isinstance(live, nn.Module) or module.source is None or _written(tx, live):
            # The trace knows a state of the module that the live one is not in.
            return bind.call_function(tx, [module, *rest], {})
        names, tie_weights, strict = (arg.as_python_constant() for arg in rest)

        try:
            binding = _guarded_binding(tx, module, names, tie_weights, strict)
        except errors.FcallError as error:
            errors.fail_while_tracing(type(error), *error.details)
        result = (binding._replace(kept=[]), kept_on_meta(live, binding))
        return _Variable.build(tx, result)


class PlaceVariable(_Variable):
    """Resolves names while tracing, and checks values, if a call needs nothing but the usual.

    That is: a live module, mappings that are plain dicts in a trace, tensors that are no subclasses
    and not on meta, no two names for one value, and slots in dicts of parameters and buffers.
    """

    _HOP_NAME = "fcall_place"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace ``place_op(module, dicts, tie_weights, strict)``."""
        module, dicts, *rest = [arg.realize() for arg in args]
        tie_weights, strict = (arg.as_python_constant() for arg in rest)
        live = getattr(module, "value", None)
        nothing = _Variable.build(tx, (None, (), ()))
        if not isinstance(live, nn.Module) or module.source is None or _written(tx, live):
            return nothing
        given = _weights_in(tx, dicts)
        if given is None:
            return nothing
        names = tuple(given)
        placements = known(tx, "placements")
        key = id(live), names, tie_weights, strict
        if key not in placements:
            try:
                binding = binding_for(live, names, tie_weights=tie_weights, strict=strict)
            except errors.FcallError:
                return nothing  # and have it raised
            placements[key] = _placement(binding, names)
            if binding.same or kept_on_meta(live, binding):
                placements[key].is_possible = False
        if not placements[key].is_possible:
            return nothing
        _guarded_binding(tx, module, names, tie_weights, strict)
        of_names = dynamo.TupleVariable([_Variable.build(tx, name) for name in names])
        values = dynamo.TupleVariable(list(given.values()))
        return dynamo.TupleVariable([placement_variable(placements[key]), of_names, values])


def _placement(binding: Binding, names: tuple[str, ...]) -> Placement:
    asked_for = dict(zip(binding.homes, names))
    targets = enumerate(zip(binding.slots, binding.sources))
    return Placement(
        binding,
        [(asked_for.get(position), slot, source) for position, (slot, source) in targets],
        is_in_operator=True,
        placeholders=tuple([placeholder_name(name) for name in names]),
    )


def _weights_in(tx: Any, dicts: Any) -> dict[str, Any] | None:
    """Return by name the variables that stand for the tensors in one mapping, or in several."""
    parts = [dicts]
    if _class_of(dicts) in (list, tuple):
        parts = [part.realize() for part in _tuple_of(tx, dicts)]
    given: dict[str, Any] = {}
    count = 0
    for part in parts:
        if _class_of(part) not in (dict, OrderedDict):
            return None
        keys, values = _tuple_of(tx, part), _tuple_of(tx, part.call_method(tx, "values", [], {}))
        if not all(key.is_python_constant() for key in keys):
            return None
        names = [key.as_python_constant() for key in keys]
        given.update(zip(names, [value.realize() for value in values]))
        count += len(names)
    plain = len(given) == count and all(map(_is_plain, given.values()))
    return given if plain and all(isinstance(name, str) for name in given) else None


def _tuple_of(tx: Any, variable: Any) -> list[Any]:
    """Return the items of what can be iterated, with all guards as if the traced code did so."""
    return _Variable.build(tx, tuple).call_function(tx, [variable], {}).realize().items  # type: ignore[no-any-return]


def _class_of(variable: Any) -> Any:
    try:
        return variable.python_type()
    except NotImplementedError:  # Dynamo does not know
        return None


def _is_plain(value: Any) -> bool:
    """Whether a variable stands for a tensor of no subclass, which is on no meta device."""
    return (
        type(value) is dynamo.TensorVariable
        and value.python_type() in TENSORS
        and value.device is not None
        and value.device.type != "meta"
    )


def _guarded_binding(
    tx: Any, module: Any, names: tuple[str, ...], tie_weights: bool, strict: bool
) -> Binding:
    """Resolve names on the live module, with a guard that the result stays the same."""

    def resolve(module: nn.Module) -> Binding:
        return binding_for(module, names, tie_weights=tie_weights, strict=strict)

    binding = resolve(module.value)

    def same_binding(module: nn.Module) -> bool:
        try:
            return resolve(module) == binding
        except errors.FcallError:
            return False  # to be traced again, which raises it

    # One guard, however many such calls there are in a graph.
    guards = known(tx, "guards")
    key = id(module.value), names, tie_weights, strict
    if key not in guards or guards[key][0] != binding:
        says = "names lead to the same slots"
        guards[key] = binding, _torch.lambda_guard(same_binding, says)
    dynamo.install_guard(module.source.make_guard(guards[key][1]))
    return binding


def _written(tx: Any, module: nn.Module) -> bool:
    """Whether the traced code has replaced parts of ``module``, or is in a call that does."""
    effects = tx.output.side_effects
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers, owner._modules):
            own = own_dict(store)
            if own in effects:
                known = effects[own]
                ignored = effects.ignore_mutation_on_these_variables
                if known in ignored or effects.is_modified(known):
                    return True
    return False


dynamo.variable_classes[bind_op.__name__] = BindVariable
dynamo.variable_classes[place_op.__name__] = PlaceVariable
