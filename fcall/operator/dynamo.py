"""How Dynamo traces the operator. Imported at the first trace, since it needs all of Dynamo."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from fcall import _torch, errors, routes
from fcall.operator.dynamo_names import known
from fcall.operator.hop import functional_call_op, name_placeholders
from fcall.refused import refused_write

__all__ = ["FunctionalCallVariable"]

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
        inlined = known(tx, "inlined")
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
        inputs = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
        if any(map(_torch.has_varying_sizes_under_vmap, inputs)):
            raise _NotCapturableError("under vmap, torch has no graphs in graphs for any size")
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


class _NotCapturableError(Exception):
    """The body changes what it has no operand for, or torch cannot have it as a graph."""


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
