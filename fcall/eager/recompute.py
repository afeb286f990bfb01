"""Activation checkpointing: what is computed again in backward sees the values of the forward.

A checkpoint calls its function a second time in backward, when the substitution is over, another
one is in force, or another thread runs. So each checkpoint notes which substitutions are in force
on its thread, and with which values, and its function is called again under these and no others.

PyTorch has two kinds. The non-reentrant one keeps its function in a frame object, and takes from
the second call only what it needs for the gradients of the first: it is enough to wrap what the
frame keeps. The reentrant one (``CheckpointFunction``) runs a backward of its own through the
second call. There values that are no leaves are made inputs of its node in the graph, as they would
be inputs of a pure function, and so backward goes only once through what they were computed from.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from fcall import _torch, errors
from fcall.eager.alone import is_alone, new_swap
from fcall.eager.swap import active, is_ours, ours
from fcall.substitution import Substitution

__all__ = ["State", "SubstitutedCheckpoint", "follow_checkpoints", "only", "state_now"]

State = Sequence[tuple[Substitution, Sequence[Any]]]
"""Substitutions, outermost first, each with a value for each of its entries."""


def state_now() -> State:
    """Return what is in force on this thread."""
    return [(swap.substitution, swap.values_now()) for swap in active()]


@contextlib.contextmanager
def only(state: State) -> Iterator[None]:
    """Put ``state``, and nothing else, in force on this thread.

    What the block reassigns is forgotten: the call that ``state`` is of has had its write-back.
    """
    with contextlib.ExitStack() as stack:
        for swap in reversed(active()):
            stack.callback(swap.suspend())
        for substitution, values in state:
            layout = substitution.layout._replace(homes=[])
            swap = new_swap(substitution._replace(layout=layout), (), alone=is_alone())
            swap.put_in(values)
            stack.push(swap)
        yield


class _Again:
    """A function that is called later, and then under what is in force now."""

    def __init__(self, function: Callable[..., Any], state: State) -> None:
        self.function = function
        self.state = state

    def __call__(self, *args: Any) -> Any:
        if not self.state and not active():
            return self.function(*args)
        with only(self.state):
            return self.function(*args)


class SubstitutedCheckpoint(torch.autograd.Function):
    """A ``CheckpointFunction`` whose inputs are its function's, then values that were computed."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        preserve_rng_state: bool,
        state: State,
        count: int,
        *inputs: Any,
    ) -> Any:
        args, ctx.values, ctx.state = inputs[:count], inputs[count:], state
        return CheckpointFunction.forward(ctx, function, preserve_rng_state, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Leaves of their own, as torch makes them of the args.
        leaves = [value.detach().requires_grad_() for value in ctx.values]
        leaf_of = dict(zip(map(id, ctx.values), leaves))
        state = [(s, [leaf_of.get(id(v), v) for v in values]) for s, values in ctx.state]
        run = ctx.run_function
        ctx.run_function = _Again(run, state)
        try:
            of_args = CheckpointFunction.backward(ctx, *grads)[2:]
        except _NoGradientError:
            return (None,) * len(ctx.needs_input_grad)
        finally:
            ctx.run_function = run
        return (None, None, None, None, *of_args, *[leaf.grad for leaf in leaves])


def _apply(
    apply: Callable[..., Any], function: Callable[..., Any], preserve_rng_state: bool, *args: Any
) -> Any:
    """Do what ``CheckpointFunction.apply`` does, which is ``apply``."""
    state = state_now()
    if not state:
        return apply(_Again(function, state), preserve_rng_state, *args)
    standing = {id(v): v for _, values in state for v in values if _needs_grad(v)}
    if standing and not any(map(_needs_grad, args)):
        function = _WithMark(function)
        args = (*args, torch.empty(0, requires_grad=True))
    computed = [value for value in standing.values() if not value.is_leaf]
    return SubstitutedCheckpoint.apply(
        function, preserve_rng_state, state, len(args), *args, *computed
    )


class _WithMark:
    """A function that is given an argument more, which says that there are gradients.

    Without one torch leaves the node out of the graph, with a warning.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        out = self.function(*args[:-1])
        if torch.is_grad_enabled() and not any(
            map(_needs_grad, out if isinstance(out, tuple) else (out,))
        ):
            raise _NoGradientError
        return out


class _NoGradientError(Exception):
    """The function uses none of the values, which torch's backward takes for a mistake."""


def _needs_grad(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.requires_grad


def follow_checkpoints() -> None:
    """Have checkpoints note what is in force, whoever makes them. Doing it twice does nothing.

    What is wrapped are classes' attributes, so that it does not matter who has imported
    ``checkpoint`` by name. Dynamo never gets there: it makes an operator of ``checkpoint``.
    """
    frame = _torch.CheckpointFrame
    if frame is None:
        warnings.warn(
            f"fcall: torch {torch.__version__} keeps checkpoints in a way that fcall does not "
            "know. Gradients through non-reentrant activation checkpoints in eager calls are those "
            "of the module's own parameters. fcall supports torch 2.11 to 2.15.",
            errors.FcallWarning,
            stacklevel=2,
        )
    elif not is_ours(frame.__init__):
        init = frame.__init__

        @functools.wraps(init)
        def noting_init(
            self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> None:
            init(self, _Again(recompute_fn, state_now()), *args, **kwargs)

        frame.__init__ = ours(noting_init)  # type: ignore[method-assign]
    if not is_ours(CheckpointFunction.apply):
        apply = CheckpointFunction.apply

        @functools.wraps(apply)
        def noting_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if cls is CheckpointFunction:
                return _apply(apply, *args, **kwargs)
            return apply.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined] # a subclass

        CheckpointFunction.apply = classmethod(ours(noting_apply))  # type: ignore[assignment, method-assign]


follow_checkpoints()
