"""How Dynamo traces the operators. Imported at the first trace, since it needs all of Dynamo."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fcall import _torch, errors, routes
from fcall.at_once import placement_variable
from fcall.binding import TENSORS, Binding, kept_on_meta
from fcall.operator.hop import bind_op, functional_call_op, name_placeholders, place_op
from fcall.operator.names import placeholder_name
from fcall.placement import Placement
from fcall.plan import binding_for
from fcall.refused import refused_write
from fcall.scoped import own_dict

__all__ = ["BindVariable", "FunctionalCallVariable", "PlaceVariable"]

dynamo = _torch.dynamo()
_Variable: Any = dynamo.TorchHigherOrderOperatorVariable


class FunctionalCallVariable(_Variable):
    """Traces a call of the operator into one node, with the body as its subgraph.

    A body that does more than compute (it counts its calls, say) cannot be a subgraph. Then the
    analysis of the whole frame starts again, and in it such calls are inlined: the operations of
    the body stand directly in the caller's graph.
    """

    _HOP_NAME = "fcall"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace ``functional_call_op(*args, **kwargs)``."""
        body, operands = args[0], [operand.realize() for operand in args[1:]]
        names = kwargs["names"].as_python_constant()
        placement = kwargs["placement"].realize().value if "placement" in kwargs else None
        if placement is not None:
            names = (*placement.placeholders, *names)
        called = kwargs["module"].realize()
        module = called.python_type().__name__
        inlined = _inlined_calls(tx)
        # A module made in the traced code is made anew in each attempt: its class has to do.
        key = (called.python_type() if called.source is None else id(called.value), names)
        try:
            if key in inlined:
                _record_when_done(tx, module, routes.INLINED, inlined[key])
                return body.call_function(tx, operands, {})
            stores = kwargs["stores"].items if "stores" in kwargs else []
            return self._trace(tx, body, operands, names, module, stores)
        except (dynamo.Unsupported, *dynamo.of_operations, _NotCapturableError) as error:
            refused = refused_write(called.value, error)
            if refused:
                errors.fail_while_tracing(errors.InPlaceUnderTransformError, *refused)
            if isinstance(error, dynamo.of_operations):
                raise
            if key not in inlined:
                inlined[key] = _summary(error)
                restart = f"fcall: inline the call of {module}"
            elif placement is not None:
                placement.is_possible = False
                tx.speculation_log.clear()  # the next attempt goes another way before the call
                restart = f"fcall: trace the substitution in {module} as it is written"
            else:
                raise
            raise dynamo.SpeculationRestartAnalysis(restart_reason=restart) from error

    def _trace(
        self, tx: Any, body: Any, operands: list[Any], names: Any, module: str, stores: Any
    ) -> Any:
        with _Scratch(tx, stores) as scratch:
            out, graph, lifted, graph_outputs = dynamo.speculate_subgraph(
                tx,
                body,
                operands,
                {},
                "fcall",
                source_target=self.value,
                set_subgraph_inputs="automatic_with_forced_inputs",
                supports_input_mutation=True,
                supports_aliasing=True,
            )[:4]
        scratch.check_restored()
        graph_module = GraphModule(tx.output.nn_modules, graph)
        name_placeholders(graph_module, names)
        body_node = dynamo.make_attr(tx, tx.output.install_subgraph("fcall_body", graph_module))
        # The order of the operands: those given, then what the body uses of the world outside.
        operands_in_graph = (body_node, *[operand.as_proxy() for operand in operands], *lifted)
        output_nodes = graph.find_nodes(op="output")[0].args[0]
        examples = _torch.pytree.tree_map_only(
            Node, lambda node: node.meta["example_value"], output_nodes
        )
        _record_when_done(tx, module, routes.OPERATOR)
        return dynamo.call_subgraph(
            tx, self.value, operands_in_graph, {}, examples, out, graph_outputs
        )


class BindVariable(_Variable):
    """Resolves names while tracing, on the live module, and guards that the result stays the same.

    To trace :func:`fcall.binding.bind` would take long, and would make inputs of all tensors of the
    module: replacing one would compile anew, and so would giving the module's own tensors in one
    call, but not in the next.
    """

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
            binding = _guarded_binding(module, names, tie_weights, strict)
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
        placements = _placements(tx)
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
        _guarded_binding(module, names, tie_weights, strict)
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
        parts = [part.realize() for part in dicts.unpack_var_sequence(tx)]
    given: dict[str, Any] = {}
    count = 0
    for part in parts:
        if _class_of(part) not in (dict, OrderedDict):
            return None
        # As the traced code would ask for them, so that Dynamo guards what it has to.
        keys, values = (
            part.call_method(tx, name, [], {}).unpack_var_sequence(tx)
            for name in ("keys", "values")
        )
        if not all(key.is_python_constant() for key in keys):
            return None
        names = [key.as_python_constant() for key in keys]
        given.update(zip(names, [value.realize() for value in values]))
        count += len(names)
    plain = len(given) == count and all(map(_is_plain, given.values()))
    return given if plain and all(isinstance(name, str) for name in given) else None


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
    module: Any, names: tuple[str, ...], tie_weights: bool, strict: bool
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

    guard = _torch.lambda_guard(same_binding, "names lead to the same slots")
    dynamo.install_guard(module.source.make_guard(guard))
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


class _NotCapturableError(Exception):
    """The body changes what it has no operand for."""


class _Scratch:
    """The dicts of the module into which the body writes its operands, and which it restores.

    Dynamo refuses a subgraph that mutates what lives outside of it, and would replay the mutation
    after each run of the graph (clearing the dict for a moment, for other threads to see). Here the
    mutation undoes itself, so Dynamo is told to ignore it, which makes it our duty to check.
    """

    def __init__(self, tx: Any, stores: Any) -> None:
        self.side_effects = tx.output.side_effects
        ignored = self.side_effects.ignore_mutation_on_these_variables
        # A call inside of a call of the same module leaves to the outer one what that ignores.
        self.stores = [store for store in map(_realized, stores) if store not in ignored]
        # It must restore that, too: what it puts there is of its own graph, not of the outer one.
        self.restored = [*self.stores, *ignored]

    def __enter__(self) -> _Scratch:
        self.before = [dict(store.items) for store in self.restored]
        for store in self.stores:
            self.side_effects.ignore_mutations_on(store)
        return self

    def __exit__(self, *exception: object) -> None:
        for store in self.stores:
            self.side_effects.stop_ignoring_mutations_on(store)

    def check_restored(self) -> None:
        for store, before in zip(self.restored, self.before):
            if list(before) != list(store.items) or any(
                _realized(store.items[key]) is not _realized(value) for key, value in before.items()
            ):
                raise _NotCapturableError("the module reassigns a tensor it was given no value for")


def _realized(variable: Any) -> Any:
    return variable.realize()


def _inlined_calls(tx: Any) -> dict[tuple[Any, tuple[str, ...]], str]:
    """Return the calls to be inlined in this frame, with their reasons, as known so far.

    They are kept where Dynamo keeps what it learnt in earlier attempts at the same frame.
    """
    log = tx.speculation_log
    if not hasattr(log, "fcall_inlined"):
        log.fcall_inlined = {}
    return log.fcall_inlined  # type: ignore[no-any-return]


def _placements(tx: Any) -> dict[Any, Placement]:
    """Return the placements in this frame, some of which turned out not to be possible."""
    log = tx.speculation_log
    if not hasattr(log, "fcall_placements"):
        log.fcall_placements = {}
    return log.fcall_placements  # type: ignore[no-any-return]


def _summary(error: Exception) -> str:
    """Return in one line what Dynamo says about a body that it cannot make a subgraph of."""
    first, *rest = str(error).strip().splitlines()
    details = [line.partition(":")[2].strip() for line in rest if _is_detail(line)]
    return ": ".join([first, *details])


def _is_detail(line: str) -> bool:
    return line.strip().startswith(("Explanation:", "Developer debug context:"))


def _record_when_done(tx: Any, module: str, kind: str, reason: str = "") -> None:
    """Record the route once the graph is complete: attempts that are given up do not count."""
    tx.output.register_finalizer_fns.append(
        lambda graph_module: routes.record(module, kind, reason)
    )


dynamo.variable_classes[functional_call_op.__name__] = FunctionalCallVariable
dynamo.variable_classes[bind_op.__name__] = BindVariable
dynamo.variable_classes[place_op.__name__] = PlaceVariable
