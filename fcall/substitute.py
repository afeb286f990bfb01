"""``substitute``: one substitution for several calls of a module."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from fcall import _torch
from fcall.call import swap_for_block
from fcall.given import Weights, write_back
from fcall.rnn import PlainRNNs, needs_plain_rnns

__all__ = ["substitute"]


class substitute:
    """In its context, ``module`` has the given parameters and buffers in place of its own.

    What :func:`fcall.functional_call` does for one call, for all that stands in a ``with`` block:
    several calls, other methods, reading ``module.weight``. Under ``torch.compile`` the block is a
    part of the caller's graph, and is not an operator; ``module`` may hold RNNs, but not be one.

    Args:
        module: The module. It is mutated until the block ends, also if that is by an exception.
        parameter_and_buffer_dicts: As for :func:`fcall.functional_call`. Mutated: the tensors, by
            what the module does to them in place; and the dicts, when the block ends, in which a
            tensor that the module reassigned is replaced.
        tie_weights: As for :func:`fcall.functional_call`.
        strict: As for :func:`fcall.functional_call`.

    Returns:
        A context manager that gives ``module``. It can be entered once.

    Raises:
        FcallError: those of :func:`fcall.functional_call`, on entering.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> with fcall.substitute(model, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}):
        ...     model(torch.randn(1, 3)), model.weight.sum()
        (tensor([[1., 1.]]), tensor(0.))
    """

    def __init__(
        self,
        module: nn.Module,
        parameter_and_buffer_dicts: Weights,
        *,
        tie_weights: bool = True,
        strict: bool = False,
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            _torch.allow_rnns_in_this_trace()  # before the module is looked at, as one of them
        self.module = module
        self.dicts = parameter_and_buffer_dicts
        self.tie_weights = tie_weights
        self.strict = strict

    def __enter__(self) -> nn.Module:
        self.names, self.swap = swap_for_block(
            self.module, self.dicts, tie_weights=self.tie_weights, strict=self.strict
        )
        try:
            self.swap.__enter__()
            self.rnns: Any = None
            if needs_plain_rnns(self.swap.substitution.rnns, self.swap.values):
                self.rnns = PlainRNNs()
                self.rnns.__enter__()
            return self.module
        except BaseException:
            self.swap.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.rnns is not None:
                self.rnns.__exit__(kind, error, traceback)
            self.swap.close()
        finally:
            self.swap.close()  # an interrupt may have come in between
            write_back(self.dicts, self.names, self.swap.changed)

    def __del__(self) -> None:
        # An interrupt may come between the end of the block and __exit__.
        swap = getattr(self, "swap", None)
        if swap is not None:
            swap.close()
