"""The namespace of ``torch.func``, each transform in eager mode and under ``torch.compile``.

What works in both is torch's own. ``functional_call`` is fcall's; ``linearize`` and
``functionalize``, which torch cannot compile, are wrapped, and so is forward mode, of which it
cannot compile all. They compose with torch's transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.func import grad, grad_and_value, jacrev, vjp, vmap

from fcall import _torch, errors
from fcall.batch_norm import replace_all_batch_norm_modules_
from fcall.call import functional_call
from fcall.stacking import stack_module_state

__all__ = [
    "functional_call",
    "functionalize",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "linearize",
    "replace_all_batch_norm_modules_",
    "stack_module_state",
    "vjp",
    "vmap",
]

# Of these, not every version of torch has each: debug_unwrap, rearrange, what is yet to come.
_others = [n for n in getattr(torch.func, "__all__", dir(torch.func)) if not n.startswith("_")]
for _name in _others:
    if _name not in __all__:
        globals()[_name] = getattr(torch.func, _name)
        __all__ += [_name]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def _compilable(forward_mode: F) -> F:
    """Return a transform of torch in forward mode, made fit for what Dynamo cannot trace."""

    @functools.wraps(forward_mode)
    def transform(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            _torch.give_zero_tangents_storage_in_this_trace()
        return forward_mode(*args, **kwargs)

    return transform  # type: ignore[return-value]


jvp = _compilable(torch.func.jvp)
jacfwd = _compilable(torch.func.jacfwd)
hessian = _compilable(torch.func.hessian)


def linearize(func: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``func`` at ``primals``, and its linear approximation there.

    The approximation is ``lambda *tangents: jvp(func, primals, tangents)[1]``. Eagerly it is
    torch's graph with all that depends on the primals computed once. That graph has no gradient
    and holds the numbers it was made with. So it is ``jvp`` itself, which runs ``func`` at
    each call, where these matter: under ``torch.compile``, ``torch.export`` and ``make_fx``, inside
    of another transform, and where the output of ``func`` requires grad.

    Args:
        func: A function of tensors, nested in dicts and the like, that returns such.
        *primals: Where it is approximated. Not mutated, and not copied.

    Returns:
        The output, and a function of as many tangents as there are primals, each nested alike,
        with tensors of the same shapes and dtypes. It returns tangents of the output.

    Raises:
        TangentsError: in a call of the returned function, the tangents are not like the primals
            (a ``RuntimeError``).

    Example::

        >>> import torch
        >>> from fcall.func import linearize
        >>> out, push = linearize(torch.sin, torch.zeros(2))
        >>> push(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])

    The semantics are those of torch.func 2.13, which cannot be compiled, gives wrong numbers in
    ``grad`` and ``make_fx``, and loses the gradient with respect to a module's parameters.
    """
    if _is_transformed():
        return func(*primals), _bound_jvp(func, primals)
    out, push = torch.func.linearize(func, *primals)
    leaves = _torch.pytree.tree_leaves(out)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        return out, _bound_jvp(func, primals)

    def checked(*tangents: Any) -> Any:
        _check_tangents(primals, tangents)
        return push(*tangents)

    return out, checked


def functionalize(func: Callable[..., T], *, remove: str = "mutations") -> Callable[..., T]:
    """Return ``func`` without in-place operations on what it computes.

    In a function that ``torch.compile`` or ``torch.export`` traces it calls ``func`` as it is, for
    AOTAutograd functionalises the whole graph; elsewhere it is torch's own.

    Args:
        func: Any function.
        remove: ``"mutations"``, or ``"mutations_and_views"`` to remove views, too. In a traced
            function both do the same.

    Returns:
        A function with the arguments and results of ``func``. It mutates in its arguments what
        ``func`` does.

    Raises:
        FunctionalizeOptionError: ``remove`` is something else (a ``RuntimeError``).

    Example::

        >>> import torch
        >>> from fcall.func import functionalize
        >>> functionalize(lambda x: x.clone().add_(1))(torch.zeros(2))
        tensor([1., 1.])

    The semantics are those of torch.func 2.13, which cannot be compiled.
    """
    if remove not in ("mutations", "mutations_and_views"):
        errors.fail(errors.FunctionalizeOptionError, remove)
    if torch.compiler.is_dynamo_compiling():
        return func
    eagerly: Callable[..., T] = torch.func.functionalize(func, remove=remove)

    # Not the attributes: some of them steer Dynamo, and are about func alone.
    @functools.wraps(func, updated=())
    def functionalized(*args: Any, **kwargs: Any) -> T:
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return eagerly(*args, **kwargs)

    return functionalized


def _is_transformed() -> bool:
    """Whether the caller is traced or recorded, or runs inside of a transform."""
    if torch.compiler.is_compiling() or _torch.OPERATOR_PROBLEM:
        return True
    return _torch.in_functorch_transform() or _torch.in_proxy_mode()


def _bound_jvp(func: Callable[..., Any], primals: tuple[Any, ...]) -> Callable[..., Any]:
    def push(*tangents: Any) -> Any:
        _check_tangents(primals, tangents)
        return jvp(func, primals, tangents)[1]

    return push


def _check_tangents(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> None:
    expected, expected_nest = _torch.pytree.tree_flatten(primals)
    got, got_nest = _torch.pytree.tree_flatten(tangents)
    if got_nest != expected_nest:
        errors.fail(errors.TangentsError, "nesting", str(got_nest), str(expected_nest))
    for i, (tangent, primal) in enumerate(zip(got, expected)):
        if tangent.shape != primal.shape:
            shapes = str(tuple(tangent.shape)), str(tuple(primal.shape))
            errors.fail(errors.TangentsError, f"shape at position {i}", *shapes)
        if tangent.dtype != primal.dtype:
            dtypes = str(tangent.dtype), str(primal.dtype)
            errors.fail(errors.TangentsError, f"dtype at position {i}", *dtypes)
