"""The deprecated name of ``functional_call``, as in ``torch.nn.utils.stateless``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fcall import _torch, call
from fcall.deprecation import warn_deprecated

__all__ = ["functional_call"]


@_torch.shown_no_module
def functional_call(
    _: object,
    module: nn.Module,
    parameters_and_buffers: Mapping[str, Tensor],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Do as :func:`fcall.functional_call`, under its deprecated name, and warn that it is one.

    A replacement for ``torch.nn.utils.stateless.functional_call`` that also works under
    ``torch.compile(fullgraph=True)``, where the warning is given while the call is traced.

    Args:
        module: The module to call. It is the same after the call, also when it raises.
        parameters_and_buffers: Values by name. Mutated as in :func:`fcall.functional_call`.
        args: The positional arguments of the call: a tuple, or a single value that is not a tuple.
        kwargs: The keyword arguments of the call.
        tie_weights: Whether names that are tied in the module follow the value given for one.
        strict: Whether names that are missing or unexpected are an error.

    Returns:
        What the module returns.

    Raises:
        FcallError: as :func:`fcall.functional_call` does.

    Warns:
        FutureWarning: always; it names the replacement, :func:`fcall.functional_call`.

    Example::

        >>> import warnings
        >>> import fcall.stateless, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> params = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     fcall.stateless.functional_call(model, params, torch.ones(1, 3))
        tensor([[0., 0.]])

    The semantics are those of ``torch.nn.utils.stateless`` in torch 2.13, with the differences
    listed in docs/semantics.md.
    """
    warn_deprecated("stateless.functional_call", "fcall.functional_call")
    return unwarned_functional_call(
        module, parameters_and_buffers, args, kwargs, tie_weights=tie_weights, strict=strict
    )


@_torch.shown_no_module
def unwarned_functional_call(
    _: object,
    module: nn.Module,
    parameters_and_buffers: Mapping[str, Tensor],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Do as :func:`functional_call` without the warning: torch's own code calls that."""
    return call.functional_call(
        module, parameters_and_buffers, args, kwargs, tie_weights=tie_weights, strict=strict
    )
