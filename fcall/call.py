"""``functional_call``: normalise the arguments, choose the route, write changed state back."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fcall import (
    _torch,
    binding,
    eager,
    errors,
    given,
    identity,
    operator,
    passes,
    plan,
    routes,
    scoped,
    substitution,
)
from fcall.binding import check_values
from fcall.given import (
    Weights,
    merge,
    prepare,
    refuse_gradients_in_export,
    refuse_meta,
    refuse_unsupported,
    write_back,
)
from fcall.mismatch import explain_mismatch
from fcall.refused import refused_write
from fcall.rnn import needs_plain_rnns, with_plain_rnns
from fcall.substitution import Substituted, Substitution, substitution_of

__all__ = ["functional_call"]

_inlines: ContextVar[bool] = ContextVar("fcall_inlines", default=False)


@_torch.shown_no_module
def functional_call(
    _: object,
    module: nn.Module,
    parameter_and_buffer_dicts: Weights,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
    method: str | None = None,
) -> Any:
    """Call ``module`` with the given parameters and buffers in place of its own.

    A drop-in replacement for :func:`torch.func.functional_call`. Under ``torch.compile`` and
    ``torch.export`` the call is one operator in the captured graph, with the given tensors and the
    inputs as its operands; :func:`fcall.record_routes` tells when it is not, and why.

    Args:
        module: The module to call. It is the same after the call, also when it raises.
        parameter_and_buffer_dicts: Values by name, as in ``module.named_parameters()`` and
            ``named_buffers()``; one dict, or a list or tuple of dicts without common names. What is
            left out stays the module's own. The names of a module wrapped by ``torch.compile``
            may have the prefix ``_orig_mod.`` or not. The plain name of a parametrized tensor
            (``"layer.weight"``) disables its parametrization;
            ``"layer.parametrizations.weight.original"`` goes through it. Mutated: the tensors, by
            what the module does to them in place; and the dicts, in which a tensor that the module
            reassigns (``self.step = self.step + 1``) is replaced under the same name.
        args: The positional arguments of the call: a tuple, or a single value that is not a tuple.
        kwargs: The keyword arguments of the call.
        tie_weights: Whether names that are tied in the module (one tensor under two names) all
            follow the value given for one of them. With ``False`` each has its own.
        strict: Whether names that are missing or unexpected are an error.
        method: The method to call; ``None`` calls the module itself, with its hooks.

    Returns:
        What the module returns.

    Raises:
        DuplicateNameError: a name is in two dicts (a ``ValueError``).
        InPlaceUnderTransformError: the module writes in place into a tensor that a transform shares
            (``RuntimeError``).
        InvalidDictsError: neither a mapping nor a sequence of mappings (a ``ValueError``).
        InvalidNameError: a key is not a dotted name (a ``KeyError``).
        MetaTensorError: a tensor on meta has no value in a call with real ones (``RuntimeError``).
        NotATensorError: a value is not a tensor (a ``TypeError``).
        SharedSlotError: with ``tie_weights=False``, two paths to one submodule have different
            values (a ``ValueError``).
        StrictKeysError: with ``strict``, the names are not those of the module (``RuntimeError``).
        TiedValuesError: tied names have different values (a ``ValueError``).
        UnknownPathError: a name leads through no submodule (an ``AttributeError``).
        UnsupportedModuleError: a scripted or traced module, or ``nn.DataParallel``
            (a ``RuntimeError``).

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> params = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> fcall.functional_call(model, params, torch.ones(1, 3))
        tensor([[0., 0.]])

    The semantics are those of torch.func 2.13, with the differences listed in docs/semantics.md.
    """
    if args is None:
        args = ()
    elif not isinstance(args, tuple):
        args = (args,)
    if is_dynamo_compiling():
        _torch.allow_rnns_in_this_trace()  # before the module is looked at, as one of them
    own_kwargs = dict(kwargs) if kwargs else {}  # not dict({}), which takes long to trace
    return _call(module, parameter_and_buffer_dicts, args, own_kwargs, tie_weights, strict, method)


def call_inlined(
    module: nn.Module,
    weights: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    tie_weights: bool,
    method: str | None,
) -> Any:
    """Do as :func:`functional_call`, but never as an operator: for a graph that needs no border.

    Nor are the calls as operators that the module makes. Where Dynamo traces it, it is one.
    """
    if is_dynamo_compiling():
        return _call(module, weights, args, kwargs, tie_weights, False, method)
    token = _inlines.set(True)
    try:
        return _call(module, weights, args, kwargs, tie_weights, False, method)
    finally:
        _inlines.reset(token)


def _call(
    module: nn.Module,
    dicts: Weights,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tie_weights: bool,
    strict: bool,
    method: str | None,
) -> Any:
    # Asked here, and not by who calls: at a graph break in the module, Dynamo has this function
    # called, and then it is not traced.
    if is_dynamo_compiling():
        return _call_in_trace(module, dicts, args, kwargs, tie_weights, strict, method)
    alone = eager.is_alone()  # before the module is looked at
    names, values, substitution, originals = prepare(
        module, dicts, (args, kwargs), tie_weights=tie_weights, strict=strict, method=method
    )
    if operator.is_recorded() and not _inlines.get():
        out, changed = operator.call(module, method, substitution, names, values, args, kwargs)
        write_back(dicts, names, changed)
        return out
    if routes.recordings:
        routes.record(type(module).__name__, routes.EAGER)
    target = module if method is None else getattr(module, method)
    if substitution.rnns and needs_plain_rnns(substitution.rnns, (*values, *args)):
        target = with_plain_rnns(target)
    swap = (eager.Direct if alone else eager.Beside)(substitution, values)
    try:
        try:
            swap.put_in(substitution.spread(values), originals)
            return target(*args, **kwargs)
        finally:
            swap.close()
    except Exception as error:
        refused = refused_write(module, error)
        if refused:
            raise errors.InPlaceUnderTransformError(*refused) from error
        explain_mismatch(module, names, values, error)
        raise
    finally:
        if not swap.is_over:
            swap.close()  # which an interrupt ended
        if swap.changed:
            write_back(dicts, names, swap.changed)


def _call_in_trace(
    module: nn.Module,
    dicts: Weights,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tie_weights: bool,
    strict: bool,
    method: str | None,
) -> Any:
    _begin_in_trace(module, method)
    placement, of_placement, placed = operator.place(module, dicts, tie_weights, strict)
    if placement is not None:  # Dynamo can put the weights into place all at once
        out, changed = operator.call_placed(module, method, placement, placed, args, kwargs)
        if changed:
            by_number = {of_placement.index(name): value for name, value in changed}
            write_back(dicts, of_placement, by_number)
        return out
    names, values, substitution = _prepare_in_trace(
        module, dicts, (args, kwargs), tie_weights, strict
    )
    out, by_number = operator.call(module, method, substitution, names, values, args, kwargs)
    write_back(dicts, names, by_number)
    return out


def _begin_in_trace(module: nn.Module, method: str | None) -> None:
    _torch.allow_rnns_in_this_trace()
    _torch.give_zero_tangents_storage_in_this_trace()
    refuse_unsupported(module, method)
    refuse_gradients_in_export(type(module).__name__)


def _prepare_in_trace(
    module: nn.Module, dicts: Weights, inputs: Any, tie_weights: bool, strict: bool
) -> tuple[tuple[str, ...], tuple[Any, ...], Substitution]:
    """Do in a trace what :func:`prepare` does."""
    given = merge(dicts)
    names, values = tuple(given), tuple(given.values())
    binding, on_meta = operator.bind(module, names, tie_weights, strict)
    substitution = substitution_of(module, binding)
    given_on_meta = check_values(module, given, binding.same, tie_weights=tie_weights)
    if on_meta or given_on_meta:
        refuse_meta(module, on_meta, given_on_meta, (values, inputs))
    return names, values, substitution


def swap_for_block(
    module: nn.Module, dicts: Weights, *, tie_weights: bool, strict: bool
) -> tuple[tuple[str, ...], eager.Swap | Substituted]:
    """Return the names given, and the context in which their values stand in ``module``."""
    if is_dynamo_compiling():
        _begin_in_trace(module, None)
        names, values, substitution = _prepare_in_trace(module, dicts, (), tie_weights, strict)
        operator.record_inlined(type(module).__name__, "a block of calls is no single call")
        return names, Substituted(substitution, values)
    names, values, substitution, _ = prepare(
        module, dicts, (), tie_weights=tie_weights, strict=strict
    )
    routes.record(type(module).__name__, routes.EAGER)
    return names, eager.new_swap(substitution, values, alone=False)


# Graphs start at functional_call or above it, not in what it calls.
_torch.start_no_graphs_in(
    _torch,
    binding,
    eager.alone,
    eager.beside,
    eager.direct,
    eager.swap,
    eager.traced,
    given,
    identity,
    passes,
    plan,
    routes,
    scoped.attributes,
    scoped.context,
    scoped.dicts,
    scoped.scope,
    substitution,
    *(_begin_in_trace, _call, _call_in_trace, _prepare_in_trace),
)
