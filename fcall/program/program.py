"""``Program``: a pure graph of a module's call, with the weights and the inputs as placeholders.

Flat inputs are in the order of :attr:`Signature.inputs`. Flat outputs are the leaves of
``(output, state)``, where ``state`` holds by name what the module reassigned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fcall import _torch, errors
from fcall.given import refuse_gradients_in_export
from fcall.program.derived import decomposed, joint, moved
from fcall.program.exported import Traced, export_traced
from fcall.program.graph_call import GraphCall, WeightsOrPath

__all__ = ["Program"]


class Program(GraphCall):
    """A call of a module as a graph that takes its weights; made by :func:`fcall.trace`.

    It holds no state: a call depends on what it is given alone, and may run in many threads at
    once. It works under the transforms of :mod:`fcall.func` and under ``torch.compile``.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> program = fcall.trace(model, dict(model.named_parameters()), torch.ones(1, 3))
        >>> program({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, torch.ones(1, 3))
        tensor([[3., 3.]])
    """

    def __init__(self, traced: Traced, defaults: Mapping[str, Tensor]) -> None:
        super().__init__(traced.signature, defaults)
        self._traced = traced
        self.__name__ = f"program_of_{traced.signature.title}"  # for messages of transforms

    @property
    def graph_module(self) -> GraphModule:
        """The graph. To change it, make a copy and pass that to :meth:`with_graph`."""
        return self._traced.graph_module

    def __call__(
        self, parameter_and_buffer_dicts: WeightsOrPath, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the graph.

        Args:
            parameter_and_buffer_dicts: Values by name, in one mapping or several, in any order.
                Names with a default may be left out; of tied names one is enough. Mutated as by
                :func:`fcall.functional_call`: tensors that the module changes in place, and entries
                that it reassigns. A path in their place is that of a file for
                :func:`fcall.open_state`, which each call opens.
            args: The positional arguments, nested as they were traced.
            kwargs: The keyword arguments.

        Returns:
            What the module returns.

        Raises:
            FcallError: what is given does not fit :attr:`signature`, which
                :meth:`Signature.flatten` has the classes for.
            ReadOnlyMappingError: the module changes weights that were given as a path, or
                reassigns those of a mapping that is read-only (a ``TypeError``).
        """
        refuse_gradients_in_export(self.__name__)
        weights = self._opened(parameter_and_buffer_dicts)
        flat = self._flatten(weights, args, kwargs)
        outputs = self.graph_module(*flat)
        out, state = _torch.pytree.tree_unflatten(outputs, self._traced.out_spec)
        self._write_back(weights, state)
        return out

    def print_readable(self) -> str:
        """Print the graph as Python code, and return it."""
        return self.graph_module.print_readable()

    def with_graph(self, graph_module: GraphModule) -> Program:
        """Return a program with another graph, for instance after a pass over a copy of this one.

        Raises:
            GraphChangedError: its placeholders or the number of its outputs are others.
        """
        graph_module.graph.lint()
        graph_module.recompile()
        expected = self.signature.placeholders
        found = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
        if found != expected:
            errors.fail(
                errors.GraphChangedError, f"its placeholders are {found}, expected {expected}"
            )
        [output] = graph_module.graph.find_nodes(op="output")
        count, needed = len(output.args[0]), self._traced.out_spec.num_leaves
        if count != needed:
            errors.fail(errors.GraphChangedError, f"it has {count} outputs, expected {needed}")
        return Program(self._traced._replace(graph_module=graph_module), self.defaults)

    def exported(self) -> ExportedProgram:
        """Return the graph as a ``torch.export.ExportedProgram``, for what takes one.

        It is called as ``exported.module()(weights, *args, **kwargs)`` with one dict of all
        :attr:`names` in their order, and returns the output, and a dict of what was reassigned. It
        has no example inputs; all inputs are user inputs.
        """
        exported = export_traced(self._traced)
        exported.example_inputs = None
        return exported

    def decompose(self, table: Mapping[Any, Callable[..., Any]] | None = None) -> Program:
        """Return the same in ATen core operators.

        Args:
            table: What to decompose, as for ``ExportedProgram.run_decompositions``; by default all
                that is not a core operator.
        """
        return Program(decomposed(self._traced, table), self.defaults)

    def to(self, device: torch.device | str) -> Program:
        """Return the same for tensors on another device, for instance after a trace on meta."""
        defaults = {name: value.to(device) for name, value in self.defaults.items()}
        return Program(moved(self._traced, torch.device(device)), defaults)

    def joint(
        self,
        loss: Callable[..., Any] | None = None,
        *,
        targets: tuple[Any, ...] = (),
        names: Collection[str] | None = None,
    ) -> Program:
        """Return forward and backward in one graph, in ATen core operators.

        It is called as this program, with targets after the positional arguments, and returns the
        loss and a dict of gradients. The nodes of these bear the names of the placeholders, after
        ``grad_``.

        Args:
            loss: A function of what the module returns, and of the targets, that returns a tensor
                with one element. ``None`` if the module returns that itself.
            targets: Example tensors; their sizes vary where they are those of varying inputs.
            names: The weights to differentiate by; by default all parameters that are real.

        Raises:
            LossError: the loss is not a real number.
            UnexpectedWeightsError: one of ``names`` is not known.
        """
        return Program(joint(self._traced, loss, targets, names), self.defaults)
