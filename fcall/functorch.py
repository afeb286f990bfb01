"""The names of the ``functorch`` package from before it became ``torch.func``, each deprecated.

``make_functional`` and its kin run on :func:`fcall.functional_call`. The transforms are those of
``fcall.func``. ``compile``, ``dim``, ``einops`` and ``experimental`` are functorch's submodules of
these names, and ``make_fx`` is its function, imported when they are first asked for.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fcall import errors, func
from fcall.call import functional_call
from fcall.deprecation import warn_deprecated
from fcall.meta import base_copy
from fcall.stacking import stack_module_state

__all__ = [
    "FunctionalModule",
    "FunctionalModuleWithBuffers",
    "combine_state_for_ensemble",
    "functionalize",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "make_functional",
    "make_functional_with_buffers",
    "vjp",
    "vmap",
]

F = TypeVar("F", bound=Callable[..., Any])
Tensors = tuple[Tensor, ...]

# --- Modules as functions -----------------------------------------------------------------------


class FunctionalModule(nn.Module):
    """What :func:`make_functional` returns: ``func(params, *args, **kwargs)``.

    Its own parameters are on the meta device: they hold the shape of the model, and no memory.
    """

    __name__ = "FunctionalModule"  # vmap asks for it, and else for a repr, which cannot be compiled

    def __init__(self, stateless_model: nn.Module, param_names: tuple[str, ...]) -> None:
        super().__init__()
        self.stateless_model = stateless_model
        self.param_names = param_names

    def forward(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        values = _named("params", self.param_names, params)
        return functional_call(self.stateless_model, values, args, kwargs)


class FunctionalModuleWithBuffers(nn.Module):
    """What :func:`make_functional_with_buffers` returns: ``func(params, buffers, *args)``.

    Its own parameters and buffers are on the meta device, as in :class:`FunctionalModule`.
    """

    __name__ = "FunctionalModuleWithBuffers"

    def __init__(
        self,
        stateless_model: nn.Module,
        param_names: tuple[str, ...],
        buffer_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.stateless_model = stateless_model
        self.param_names = param_names
        self.buffer_names = buffer_names

    def forward(
        self, params: Iterable[Tensor], buffers: Iterable[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        values = _named("params", self.param_names, params)
        state = _named("buffers", self.buffer_names, buffers)
        return functional_call(self.stateless_model, (values, state), args, kwargs)


def make_functional(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[FunctionalModule, Tensors]:
    """Split a model without buffers into a function and its parameters.

    Args:
        model: The model; it is copied.
        disable_autograd_tracking: Whether the returned parameters have ``requires_grad=False``.

    Returns:
        ``func`` and ``params``: ``func(params, *args, **kwargs)`` is the model's call. The
        parameters are copies; tied ones are there once. ``func`` can be compiled and transformed.

    Raises:
        ModelHasBuffersError: the model has buffers (a ``RuntimeError``).

    Warns:
        FutureWarning: always; it names the replacement, :func:`fcall.functional_call`.

    Example::

        >>> import warnings
        >>> import fcall.functorch, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     func, params = fcall.functorch.make_functional(model)
        >>> x = torch.ones(1, 3)
        >>> torch.equal(func(params, x), model(x))
        True

    The semantics are those of ``functorch.make_functional`` in torch 2.13; too few or too many
    parameters in a call are an error here.
    """
    warn_deprecated("functorch.make_functional", "fcall.functional_call")
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise errors.ModelHasBuffersError(type(model).__name__, buffers)
    base, params, _ = _split(model, disable_autograd_tracking)
    return FunctionalModule(base, tuple(params)), tuple(params.values())


def make_functional_with_buffers(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[FunctionalModuleWithBuffers, Tensors, Tensors]:
    """Split a model into a function, its parameters and its buffers.

    Args:
        model: The model; it is copied.
        disable_autograd_tracking: Whether the returned parameters have ``requires_grad=False``.

    Returns:
        ``func``, ``params`` and ``buffers``: ``func(params, buffers, *args, **kwargs)`` is the
        model's call. What the model does to a buffer in place happens to the given one; where it
        puts a new tensor in a buffer's place, that is lost.

    Warns:
        FutureWarning: always; it names the replacement, :func:`fcall.functional_call`.

    Example::

        >>> import warnings
        >>> import fcall.functorch, torch
        >>> model = torch.nn.BatchNorm1d(3)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     func, params, buffers = fcall.functorch.make_functional_with_buffers(model)
        >>> out = func(params, buffers, torch.ones(2, 3))
        >>> buffers[2], model.num_batches_tracked
        (tensor(1), tensor(0))

    The semantics are those of ``functorch.make_functional_with_buffers`` in torch 2.13.
    """
    warn_deprecated("functorch.make_functional_with_buffers", "fcall.functional_call")
    base, params, buffers = _split(model, disable_autograd_tracking)
    function = FunctionalModuleWithBuffers(base, tuple(params), tuple(buffers))
    return function, tuple(params.values()), tuple(buffers.values())


def combine_state_for_ensemble(
    models: Sequence[nn.Module],
) -> tuple[FunctionalModuleWithBuffers, Tensors, Tensors]:
    """Stack the parameters and buffers of models of one kind, for ``vmap``.

    Args:
        models: ``M`` models of one class, all in training or all in evaluation mode.

    Returns:
        ``func``, ``params`` and ``buffers``; each tensor has a new first dimension of size ``M``
        and does not require grad. ``vmap(func, (0, 0, None))(params, buffers, x)`` is the ensemble.

    Raises:
        NoModelsError: there are no models (a ``RuntimeError``).
        UnlikeModelsError: they differ in more than values (a ``RuntimeError``).

    Warns:
        FutureWarning: always; it names the replacement, :func:`fcall.func.stack_module_state`.

    Example::

        >>> import warnings
        >>> import fcall.functorch, torch
        >>> models = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     func, params, buffers = fcall.functorch.combine_state_for_ensemble(models)
        >>> torch.vmap(func, (0, 0, None))(params, buffers, torch.ones(1, 3)).shape
        torch.Size([4, 1, 2])

    The semantics are those of ``functorch.combine_state_for_ensemble`` in torch 2.13, but for the
    models that are refused: torch also takes those whose parameters differ in ``requires_grad``.
    """
    warn_deprecated("functorch.combine_state_for_ensemble", "fcall.func.stack_module_state")
    params, buffers = stack_module_state(models)
    function = FunctionalModuleWithBuffers(base_copy(models[0]), tuple(params), tuple(buffers))
    return function, _detached(params), _detached(buffers)


def _split(
    model: nn.Module, disable_autograd_tracking: bool
) -> tuple[nn.Module, dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return the model without its tensors, and copies of these by name."""
    # In one copy, since a buffer may be a view of a parameter.
    params, buffers = copy.deepcopy((dict(model.named_parameters()), dict(model.named_buffers())))
    if disable_autograd_tracking:
        for parameter in params.values():
            parameter.requires_grad_(False)
    return base_copy(model), params, buffers


def _detached(state: dict[str, Tensor]) -> Tensors:
    return tuple(tensor.detach() for tensor in state.values())


def _named(kind: str, names: tuple[str, ...], values: Iterable[Tensor]) -> dict[str, Tensor]:
    values = tuple(values)
    if len(values) != len(names):
        errors.fail(errors.ValuesCountError, kind, len(names), len(values))
    return dict(zip(names, values))


# --- Transforms ---------------------------------------------------------------------------------


def _deprecated(transform: F) -> F:
    """Return a transform of ``fcall.func`` with a warning that this is its name now."""
    name = transform.__name__

    @functools.wraps(transform)
    def old(*args: Any, **kwargs: Any) -> Any:
        warn_deprecated(f"functorch.{name}", f"fcall.func.{name}")
        return transform(*args, **kwargs)

    old.__module__ = __name__
    old.__doc__ = f"Do as ``fcall.func.{name}``, under its deprecated name, and warn that it is."
    return old  # type: ignore[return-value]


vmap = _deprecated(func.vmap)
grad = _deprecated(func.grad)
grad_and_value = _deprecated(func.grad_and_value)
vjp = _deprecated(func.vjp)
jvp = _deprecated(func.jvp)
jacrev = _deprecated(func.jacrev)
jacfwd = _deprecated(func.jacfwd)
hessian = _deprecated(func.hessian)
functionalize = _deprecated(func.functionalize)


def __getattr__(name: str) -> Any:
    if name in ("compile", "dim", "einops", "experimental"):
        return importlib.import_module(f"functorch.{name}")
    if name == "make_fx":
        return importlib.import_module("functorch").make_fx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
