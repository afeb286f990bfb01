"""The one room that imports torch's private modules.

An entry says what it is for and when it can go; all were tried on torch 2.11, 2.13 and 2.15. Where
a name is gone, :data:`OPERATOR_PROBLEM` or :class:`DynamoUnavailableError` says so, and calls are
inlined, which needs none of them. What is needed only under Dynamo is imported by :func:`dynamo`
at the first trace, since importing ``torch._dynamo`` takes longer than the rest of fcall.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch

# The base of all batch norms, those that are lazy or synchronised too. No public name.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrize

# Flattening of nested arguments. Goes when the public torch.utils.pytree has its functions.
from torch.utils import _pytree as pytree

__all__ = [
    "OPERATOR_PROBLEM",
    "BatchNorm",
    "DynamoUnavailableError",
    "HigherOrderOperator",
    "ProxyTorchDispatchMode",
    "allow_rnns_in_this_trace",
    "dynamo",
    "evaluated_while_tracing",
    "functional_calls",
    "has_preserved_node_meta",
    "in_functorch_transform",
    "in_proxy_mode",
    "pre_dispatch_proxy_mode",
    "pytree",
    "reenter_make_fx",
    "runs_pre_dispatch",
    "set_parametrization_cache",
    "start_no_graphs_in",
    "track_tensor_tree",
]

F = TypeVar("F", bound=Callable[..., Any])

OPERATOR_PROBLEM = ""
"""Why there can be no operator with this torch, or an empty string."""

try:
    # Rules for make_fx: how an operator is recorded. No public name yet.
    from torch._higher_order_ops.utils import reenter_make_fx

    # The base of operators that take functions: the way to add one, without a public name yet.
    from torch._ops import (
        HigherOrderOperator,
        _compute_keyset,
        _get_dispatch_mode_pre_dispatch,
    )
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
    from torch.fx.traceback import has_preserved_node_meta

    _peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    _pre_dispatch = torch._C.DispatchKey.PreDispatch
    _proxy = torch._C._TorchDispatchModeKey.PROXY
    _get_dispatch_mode = torch._C._get_dispatch_mode
except (ImportError, AttributeError) as error:
    OPERATOR_PROBLEM = str(error)


def in_functorch_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is running around the caller."""
    return _peek_interpreter_stack() is not None


def runs_pre_dispatch(operator: HigherOrderOperator, operands: tuple[Any, ...]) -> bool:
    """Whether a call of ``operator`` would be taken by a mode of the pre-dispatch stack."""
    keys = _compute_keyset(operands, {}, operator.non_fallthrough_keys)
    return bool(keys.highestPriorityTypeId() == _pre_dispatch)


def pre_dispatch_proxy_mode() -> bool:
    """Whether ``make_fx(pre_dispatch=True)`` or non-strict export is recording the caller."""
    return _get_dispatch_mode_pre_dispatch(_proxy) is not None


def in_proxy_mode() -> bool:
    """Whether ``make_fx`` in any of its modes, or non-strict export, is recording the caller."""
    return pre_dispatch_proxy_mode() or _get_dispatch_mode(_proxy) is not None


def evaluated_while_tracing(fn: F) -> F:
    """Mark ``fn`` to be run by Dynamo when it traces a call of it, the result being a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports all of Dynamo at once.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def start_no_graphs_in(*functions_or_modules: Any) -> None:
    """Keep Dynamo from starting graphs at these functions, and at all in these modules.

    They may still be traced as part of a caller. After a graph break in a module, fcall's frames
    run as plain Python, and what the module calls is compiled: the same that happens for
    ``module(x)``. No public name yet; where it is gone, a graph break costs more compilations.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        for code in _codes_of(functions_or_modules):
            frames.set_code_exec_strategy(code, skip)
    except AttributeError:
        pass


def _codes_of(things: Iterable[Any]) -> Iterator[CodeType]:
    """Yield the code of functions, of all in modules and classes, and of what is nested in it."""
    for thing in things:
        if isinstance(thing, CodeType):
            yield thing
            yield from _codes_of(const for const in thing.co_consts if isinstance(const, CodeType))
        elif isinstance(thing, FunctionType):
            yield from _codes_of([thing.__code__])
        elif isinstance(thing, ModuleType):
            own = [
                v for v in vars(thing).values() if getattr(v, "__module__", "") == thing.__name__
            ]
            yield from _codes_of(own)
        elif isinstance(thing, type):
            yield from _codes_of(v for v in vars(thing).values() if isinstance(v, FunctionType))


def set_parametrization_cache(cache: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """Set what ``parametrize.cached()`` keeps its tensors in, and return what that was.

    It knows a tensor by its module and name, whatever the weights. Where torch keeps it otherwise
    some day, or nothing is kept, there is nothing to set, and the result is None.
    """
    before: dict[Any, Any] | None = getattr(parametrize, "_cache", None)
    if cache is None or not (before or bool(getattr(parametrize, "_cache_enabled", False))):
        return None
    parametrize._cache = cache
    return before


FUNCTIONAL_CALLS = [
    # The public name.
    ("torch.func", "torch.func", "functional_call"),
    # Its home, from which torch.func imports it: some libraries do so too.
    ("torch.func", "torch._functorch.functional_call", "functional_call"),
    # The older public name, deprecated.
    ("stateless", "torch.nn.utils.stateless", "functional_call"),
    # What both call: so those who imported one of them by name are reached too.
    ("stateless, private", "torch.nn.utils.stateless", "_functional_call"),
]
"""The places of torch's ``functional_call``: which of its three forms, the module, the attribute.

They go when torch's function does; :func:`functional_calls` leaves out what is gone.
"""


def functional_calls() -> Iterator[tuple[str, ModuleType, str]]:
    """Yield those of :data:`FUNCTIONAL_CALLS` that this torch has, with their modules."""
    for form, module, name in FUNCTIONAL_CALLS:
        try:
            home = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(home, name):
            yield form, home, name


class DynamoUnavailableError(Exception):
    """This torch lacks a private name that the operator needs under Dynamo."""


@evaluated_while_tracing
def allow_rnns_in_this_trace() -> None:
    """Let Dynamo trace ``nn.LSTM`` and the like until the present frame is done.

    Dynamo refuses them by default, as experimental. Goes when ``torch._dynamo.config.allow_rnn``
    does. Where the names are gone, an RNN breaks the graph as it does without fcall.
    """
    try:
        from torch._dynamo import config
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        before = config.allow_rnn
        config.allow_rnn = True
        output.add_cleanup_hook(lambda: setattr(config, "allow_rnn", before))
    except (ImportError, AttributeError):
        pass


@functools.cache
def dynamo() -> SimpleNamespace:
    """Import what the operator needs of Dynamo.

    Raises:
        DynamoUnavailableError: a name is gone; the message says which one. The plain inlined
            route needs none of them.
    """
    try:
        from torch._dynamo import exc
        from torch._dynamo.guards import install_guard
        from torch._dynamo.variables import higher_order_ops

        return SimpleNamespace(
            Unsupported=exc.Unsupported,
            # Starts the analysis of a frame again, after a body turned out not to be capturable.
            SpeculationRestartAnalysis=exc.SpeculationRestartAnalysis,
            # The table in which Dynamo looks up how to trace an operator, by its name.
            variable_classes=higher_order_ops._hop_name_to_variable_class,
            TorchHigherOrderOperatorVariable=higher_order_ops.TorchHigherOrderOperatorVariable,
            # Traces a function into a subgraph; outputs may be any Python object.
            speculate_subgraph=higher_order_ops.speculate_subgraph_with_auto_output_flattening,
            call_subgraph=higher_order_ops._call_function_with_auto_output_flattening,
            make_attr=higher_order_ops.make_attr,
            # Adds a condition under which the compiled code holds.
            install_guard=install_guard,
        )
    except (ImportError, AttributeError) as error:
        raise DynamoUnavailableError(str(error)) from error
