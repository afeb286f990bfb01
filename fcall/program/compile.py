"""``compile``: one compiled graph for any number of weight sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fcall.call import Weights, functional_call

__all__ = ["CompiledCall", "compile"]


class CompiledCall:
    """What :func:`compile` returns: a module compiled as a function of its weights."""

    def __init__(self, module: nn.Module, method: str, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.method = method
        self._compiled = compiled

    def __call__(self, parameter_and_buffer_dicts: Weights, /, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the given weights; compiled at the first call.

        Args:
            parameter_and_buffer_dicts: As for :func:`fcall.functional_call`, also in what of it is
                mutated.
            *args: Positional arguments of the method.
            **kwargs: Keyword arguments of the method.
        """
        return self._compiled(parameter_and_buffer_dicts, args, kwargs)

    def __repr__(self) -> str:
        return f"fcall.compile({type(self.module).__name__}, method={self.method!r})"


def compile(
    module: nn.Module,
    *,
    method: str = "forward",
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
) -> CompiledCall:
    """Compile ``module`` as a function of its parameters and buffers.

    The weights are inputs of the compiled graph: a call with other values compiles nothing, if
    names and their order, shapes, dtypes, and the kinds of tensors and mappings are the same.

    Args:
        module: The module. It is not changed, and kept alive by what is returned.
        method: The method to compile; with ``"forward"`` hooks run, too.
        backend: As for :func:`torch.compile`.
        mode: As for :func:`torch.compile`.
        dynamic: As for :func:`torch.compile`.
        options: As for :func:`torch.compile`.

    Returns:
        A callable ``f(parameter_and_buffer_dicts, *args, **kwargs)``.

    Raises:
        UnknownMethodError: the module has no such method; raised at the first call.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> f = fcall.compile(model)
        >>> x = torch.ones(1, 3)
        >>> f({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, x)
        tensor([[0., 0.]])
        >>> f({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, x)  # nothing is compiled
        tensor([[3., 3.]])
    """
    called = None if method == "forward" else method

    def call(weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(module, weights, args, kwargs, method=called)

    # Dynamo counts compilations, and gives up on too many, by code object.
    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, backend=backend, mode=mode, dynamic=dynamic, options=options)
    return CompiledCall(module, method, compiled)
