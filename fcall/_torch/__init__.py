"""The one room that imports torch's private modules.

An entry says what it is for and when it can go; all were tried on torch 2.11, 2.13 and 2.15. Where
a name is gone, :data:`OPERATOR_PROBLEM` or :class:`DynamoUnavailableError` says so, and calls are
inlined, which needs none of them. What is needed only under Dynamo is imported by :func:`dynamo`
at the first trace, since importing ``torch._dynamo`` takes longer than the rest of fcall.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

# The base of the nodes that custom autograd functions add to the graph, and of their ctx. Not for
# use outside of torch, says torch; goes when there is a hook around a node's backward that is also
# called when that raises.
from torch.autograd.function import BackwardCFunction as BackwardNode

# The base of all batch norms, those that are lazy or synchronised too. No public name.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrize

# Flattening of nested arguments. Goes when the public torch.utils.pytree has its functions.
from torch.utils import _pytree as pytree

__all__ = [
    "COMPILED_ATTRIBUTES",
    "OPERATOR_PROBLEM",
    "BackwardNode",
    "BatchNorm",
    "CheckpointFrame",
    "DynamoUnavailableError",
    "HigherOrderOperator",
    "ProxyTorchDispatchMode",
    "allow_rnns_in_this_trace",
    "attributes_when_not_compiled",
    "codes_of",
    "dynamo",
    "dynamo_is_imported",
    "evaluated_while_tracing",
    "exports_gradients",
    "functional_calls",
    "give_zero_tangents_storage_in_this_trace",
    "has_preserved_node_meta",
    "has_varying_sizes_under_vmap",
    "in_functorch_transform",
    "in_proxy_mode",
    "in_vmap_or_forward_mode",
    "is_batched",
    "is_traced_by_jit",
    "lambda_guard",
    "linear",
    "needs_gradient",
    "parametrization_cache",
    "pre_dispatch_proxy_mode",
    "pytree",
    "reenter_make_fx",
    "runs_pre_dispatch",
    "runs_under_one_vmap",
    "set_parametrization_cache",
    "shown_no_module",
    "source_of",
    "start_no_graphs_in",
    "trace_as_plain_dict",
    "track_tensor_tree",
]

try:
    # What a non-reentrant checkpoint keeps for backward; made when the checkpoint is entered.
    from torch.utils.checkpoint import _CheckpointFrame as CheckpointFrame
except ImportError:
    CheckpointFrame = None  # type: ignore[assignment, misc]

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")

# Whether torch.jit.trace runs the caller: torch.jit.is_tracing(), in a third of its time.
is_traced_by_jit: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)

OPERATOR_PROBLEM = ""
"""Why there can be no operator with this torch, or an empty string."""

try:
    # Rules for make_fx: how an operator is recorded. No public name yet.
    from torch._higher_order_ops.utils import reenter_make_fx

    # The base of operators that take functions: the way to add one, without a public name yet.
    from torch._ops import (
        HigherOrderOperator,
        _compute_keyset,
        mode_stack_state_for_pre_dispatch,
    )
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
    from torch.fx.traceback import has_preserved_node_meta

    _peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    _interpreter_stack = torch._C._functorch.get_interpreter_stack
    # Whether vmap, the innermost one, has a dimension of this tensor.
    is_batched = torch._C._functorch.is_batchedtensor
    _is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    _unwrapped = torch._C._functorch.get_unwrapped
    # What torch.nn.functional.linear is in a graph.
    linear = torch._C._nn.linear
    _grad = torch._C._functorch.TransformType.Grad
    _vmap = torch._C._functorch.TransformType.Vmap
    _jvp = torch._C._functorch.TransformType.Jvp
    _pre_dispatch = torch._C.DispatchKey.PreDispatch
    _proxy = torch._C._TorchDispatchModeKey.PROXY
    # What _get_dispatch_mode_pre_dispatch(_proxy) gets by a longer way, in each eager call.
    _pre_dispatch_modes = mode_stack_state_for_pre_dispatch().get
    _get_dispatch_mode = torch._C._get_dispatch_mode
except (ImportError, AttributeError) as error:
    OPERATOR_PROBLEM = str(error)


def evaluated_while_tracing(fn: F) -> F:
    """Mark ``fn`` to be run by Dynamo when it traces a call of it, the result being a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports all of Dynamo at once.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@evaluated_while_tracing
def in_functorch_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is running around the caller."""
    return _peek_interpreter_stack() is not None


@evaluated_while_tracing
def in_vmap() -> bool:
    """Whether vmap, or what is made of it, is running around the caller."""
    return not OPERATOR_PROBLEM and _vmap in _transforms()


def has_varying_sizes_under_vmap(value: Any) -> bool:
    """Whether ``value`` is a tensor that some vmap has a dimension of, and a size of it varies.

    In a graph of its own, below another one, torch asks for its sizes outside of the transform
    (``insert_deferred_runtime_asserts``), and fails. Goes when ``aten::sym_size.int`` has a
    batching rule.
    """
    if not isinstance(value, torch.Tensor) or not any(
        isinstance(n, torch.SymInt) for n in value.shape
    ):
        return False
    while _is_wrapped(value):
        if is_batched(value):
            return True
        value = _unwrapped(value)
    return False


def needs_gradient(value: torch.Tensor) -> bool:
    """Whether a tensor, or what a transform of torch.func has wrapped in it, needs a gradient."""
    while _is_wrapped(value) and not value.requires_grad:
        value = _unwrapped(value)
    return value.requires_grad


def runs_under_one_vmap() -> bool:
    """Whether the innermost of the transforms around the caller is ``vmap``, and no other is."""
    kinds = [level.key() for level in _interpreter_stack() or ()]
    return kinds[-1:] == [_vmap] and kinds.count(_vmap) == 1


@evaluated_while_tracing
def in_vmap_or_forward_mode() -> bool:
    """Whether vmap, jvp or what is made of them is running around the caller."""
    return not OPERATOR_PROBLEM and not _transforms().isdisjoint((_vmap, _jvp))


def _transforms() -> set[Any]:
    return {level.key() for level in _interpreter_stack() or ()}


@evaluated_while_tracing
def exports_gradients() -> bool:
    """Whether grad, vjp or what is made of them runs around the caller, and ``torch.export``."""
    # Asked in a trace of torch 2.11, is_exporting() is true of torch.compile, too.
    return torch.compiler.is_exporting() and not OPERATOR_PROBLEM and _grad in _transforms()


def runs_pre_dispatch(operator: HigherOrderOperator, operands: tuple[Any, ...]) -> bool:
    """Whether a call of ``operator`` would be taken by a mode of the pre-dispatch stack."""
    keys = _compute_keyset(operands, {}, operator.non_fallthrough_keys)
    return bool(keys.highestPriorityTypeId() == _pre_dispatch)


def pre_dispatch_proxy_mode() -> bool:
    """Whether ``make_fx(pre_dispatch=True)`` or non-strict export is recording the caller."""
    return _pre_dispatch_modes(0) is not None


def in_proxy_mode() -> bool:
    """Whether ``make_fx`` in any of its modes, or non-strict export, is recording the caller."""
    return pre_dispatch_proxy_mode() or _get_dispatch_mode(_proxy) is not None


def start_no_graphs_in(*functions_or_modules: Any) -> None:
    """Keep Dynamo from starting graphs at these functions, and at all in these modules.

    They may still be traced as part of a caller. After a graph break in a module, fcall's frames
    run as plain Python, and what the module calls is compiled: the same that happens for
    ``module(x)``. No public name yet; where it is gone, a graph break costs more compilations.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        for code in codes_of(functions_or_modules):
            frames.set_code_exec_strategy(code, skip)
    except AttributeError:
        pass


def codes_of(things: Iterable[Any]) -> Iterator[CodeType]:
    """Yield the code of functions, of all in modules and classes, and of what is nested in it."""
    for thing in things:
        if isinstance(thing, CodeType):
            yield thing
            yield from codes_of(const for const in thing.co_consts if isinstance(const, CodeType))
        elif isinstance(thing, FunctionType):
            yield from codes_of([thing.__code__])
        elif isinstance(thing, ModuleType):
            own = [
                v for v in vars(thing).values() if getattr(v, "__module__", "") == thing.__name__
            ]
            yield from codes_of(own)
        elif isinstance(thing, type):
            own = [v.fget if isinstance(v, property) else v for v in vars(thing).values()]
            yield from codes_of(v for v in own if isinstance(v, FunctionType))


_HAS_PARAMETRIZATION_CACHE = {"_cache", "_cache_enabled"} <= vars(parametrize).keys()


def parametrization_cache(*, if_unused: bool = False) -> dict[Any, Any] | None:
    """Return what ``parametrize.cached()`` keeps its tensors in, or None if it keeps nothing now.

    It knows a tensor by its module and name, whatever the weights. Should torch keep it otherwise
    some day, there is none.

    Args:
        if_unused: Whether to return it also outside of ``parametrize.cached()``.
    """
    if not _HAS_PARAMETRIZATION_CACHE:
        return None
    cache: dict[Any, Any] | None = parametrize._cache
    return cache if cache or parametrize._cache_enabled or if_unused else None


def set_parametrization_cache(cache: dict[Any, Any]) -> None:
    """Set what ``parametrize.cached()`` keeps its tensors in."""
    parametrize._cache = cache


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


@evaluated_while_tracing
def give_zero_tangents_storage_in_this_trace() -> None:
    """Let Dynamo trace forward mode through operations on tensors that have no tangent.

    Their tangents are zero tensors without storage. Kernels for these know nothing of fake tensors
    and leave plain ones on meta, upon which batch norm, group norm, or a number times a tensor
    under two transforms fail. So that for Dynamo they are plain zeros until the present frame is
    traced; what is compiled is as before. Goes when torch traces ``jvp`` of ``group_norm`` with
    respect to its weight. Where the names are gone, such calls fail as they do without fcall.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._subclasses.fake_impls import op_implementations_dict as fake_operators

        output = InstructionTranslator.current_tx().output
        zeros = torch.ops.aten._efficientzerotensor.default

        def fake_zeros(mode: Any, operator: Any, size: Any, **options: Any) -> Any:
            with mode:
                return torch.ops.aten.zeros.default(size, **options)

        def undo(*_: object) -> None:
            fake_operators.pop(zeros, None)

        fake_operators[zeros] = fake_zeros
        output.register_finalizer_fns.append(undo)  # the trace is done, and to be compiled
        output.add_cleanup_hook(undo)  # or is given up
    except (ImportError, AttributeError):
        pass


class _Owner:
    """What a function is bound to that :func:`shown_no_module` has decorated."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.__module__ = fn.__module__
        self.name = fn.__name__
        setattr(self, fn.__name__, MethodType(fn, self))

    def __reduce__(self) -> str:
        return f"{self.name}.__self__"  # pickled by its name, as functions are


def shown_no_module(fn: Callable[Concatenate[Any, P], R]) -> Callable[P, R]:
    """Return ``fn(_, module, ...)`` bound to something, as a function of ``module, ...``.

    Before Dynamo traces a call of a function it looks at the first argument, and gives up if that
    is an RNN, before :func:`allow_rnns_in_this_trace` is called in it. A bound method's first
    argument is what it is bound to. Goes when ``torch._dynamo.config.allow_rnn`` does.
    """
    return getattr(_Owner(fn), fn.__name__)  # type: ignore[no-any-return]


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
        from torch._dynamo.variables import (
            ConstDictVariable,
            TensorVariable,
            TupleVariable,
            UserDefinedObjectVariable,
            higher_order_ops,
        )

        return SimpleNamespace(
            Unsupported=exc.Unsupported,
            # What an operation raised on fake tensors: to 2.14, and from 2.15 on.
            of_operations=(exc.TorchRuntimeError, exc.ObservedException),
            # Starts the analysis of a frame again, after a body turned out not to be capturable.
            SpeculationRestartAnalysis=exc.SpeculationRestartAnalysis,
            # The table in which Dynamo looks up how to trace an operator, by its name.
            variable_classes=higher_order_ops._hop_name_to_variable_class,
            TorchHigherOrderOperatorVariable=higher_order_ops.TorchHigherOrderOperatorVariable,
            # Traces a function into a subgraph; outputs may be any Python object.
            speculate_subgraph=higher_order_ops.speculate_subgraph_with_auto_output_flattening,
            call_subgraph=higher_order_ops._call_function_with_auto_output_flattening,
            make_attr=higher_order_ops.make_attr,
            # What stands for dicts, tensors, tuples and other objects in a trace.
            ConstDictVariable=ConstDictVariable,
            TensorVariable=TensorVariable,
            TupleVariable=TupleVariable,
            UserDefinedObjectVariable=UserDefinedObjectVariable,
            # Adds a condition under which the compiled code holds.
            install_guard=install_guard,
        )
    except (ImportError, AttributeError) as error:
        raise DynamoUnavailableError(str(error)) from error


def dynamo_is_imported() -> bool:
    """Whether something was compiled, or is about to be."""
    return "torch._dynamo.variables.builder" in sys.modules


def source_of(guard: Any) -> str:
    """Return the expression for what a guard is on: a property since torch 2.12."""
    name = guard.name
    return name if isinstance(name, str) else name()  # type: ignore[no-any-return]


def trace_as_plain_dict(
    kind: type[dict[Any, Any]], is_plain: Callable[[Any], bool], problem: str
) -> None:
    """Have Dynamo trace dicts of the class ``kind`` as the plain dicts in their attribute ``own``.

    Their storage as a dict, which guards look at, has to be the same. A guard sees to it that
    ``is_plain`` is true of such a dict; where it is not, Dynamo breaks the graph for ``problem``.
    Goes when Dynamo asks objects of Python classes how they are to be traced.

    Raises:
        DynamoUnavailableError: a name is gone; the message says which one. Dynamo then traces the
            methods of ``kind``, and breaks the graph in them.
    """
    try:
        from torch._dynamo.exc import Unsupported
        from torch._dynamo.variables.builder import VariableBuilder

        def guard(builder: Any, guard: Any) -> None:
            # At the root, since where keys are guarded a dict's own manager takes no such guards.
            code = compile(source_of(guard), "<guard>", "eval")
            scope = {key: value for key, value in builder.scope.items() if key != "L"}

            def check(f_locals: Any) -> bool:
                try:
                    return is_plain(eval(code, {**scope, "L": f_locals}))
                except Exception:  # noqa: BLE001, the module is built otherwise
                    return False

            root = builder.guard_manager.root
            root.add_lambda_guard(check, [f"fcall: {problem}"], guard.user_stack)

        guard.is_always_needed = True  # type: ignore[attr-defined]

        def build(builder: Any, value: Any) -> Any:
            if not is_plain(value):
                raise Unsupported(problem)
            builder.install_guards(guard)
            return builder(value.own)

        for traces_numpy in False, True:
            VariableBuilder._type_dispatch_impl(traces_numpy)[kind] = build
    except (ImportError, AttributeError) as error:
        raise DynamoUnavailableError(str(error)) from error


COMPILED_ATTRIBUTES = ("dynamo_ctx", "_compiled_call_impl")
"""What modules have of their own of which ``torch.compile`` may have made something."""


def attributes_when_not_compiled(module: nn.Module) -> dict[str, Any]:
    """Return attributes with which ``module`` does not call what ``torch.compile`` made of it.

    None if nothing was made of it. There is no public way to call it as it was.
    """
    own = vars(module)
    if "dynamo_ctx" in own:  # torch.compile(module)
        return {"forward": module._orig_mod}
    if own.get("_compiled_call_impl") is not None:  # module.compile()
        return {"_compiled_call_impl": None}
    return {}


def lambda_guard(check: Callable[[Any], bool], says: str) -> Callable[[Any, Any], None]:
    """Return a guard for Dynamo: that ``check`` is true of what it is a guard of."""

    def create(builder: Any, guard: Any) -> None:
        manager = builder.get_guard_manager(guard)
        manager.add_lambda_guard(check, [f"fcall: {says}"], guard.user_stack)

    return create
