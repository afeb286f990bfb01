"""Custom autograd functions: their backward sees the values of the call that their forward was in.

A custom ``torch.autograd.Function`` may keep a module, or a function to be called again, on its
``ctx``, and use it in backward, when the substitution is over. What it keeps is looked at when the
call ends; if something there can be called, its backward runs under the substitutions of the call.
Other functions, most of them, get their backward as it is.

A backward that finds its module elsewhere (a global, a list on ``ctx``) sees the module's own
tensors, or those of a call in which backward runs.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from fcall import _torch
from fcall.eager.recompute import State, SubstitutedCheckpoint, only
from fcall.eager.swap import active, is_ours, ours

__all__ = ["follow_custom_functions"]


class _Backward:
    """Stands in a node's ``__dict__`` for a method of its class that runs its backward."""

    def __init__(self, node: Any, method: str, state: State) -> None:
        self.node = weakref.ref(node)  # which owns this
        self.method = method
        self.state = state

    def __call__(self, *grads: Any) -> Any:
        node = self.node()
        with only(self.state):
            return getattr(type(node), self.method)(node, *grads)


def _rebind(reference: weakref.ref[Any]) -> None:
    """Have the node run its backward under what was given to the calls that are active."""
    node = reference()
    if node is None or not any(_can_read_a_module(kept) for kept in vars(node).values()):
        return
    # What was given, and not what the module made of it: that may hold the node itself.
    state: State = [(swap.substitution, swap.given) for swap in active()]
    for method in ("apply", "apply_boxed"):
        if hasattr(node, method):
            setattr(node, method, _Backward(node, method, state))


def _can_read_a_module(kept: Any) -> bool:
    return callable(kept) and not isinstance(kept, (type, _Backward))


def follow_custom_functions() -> None:
    """Have custom functions note what is in force. Doing it twice does nothing."""
    node = _torch.BackwardNode
    init = node.__init__
    if is_ours(init):
        return
    own = (CheckpointFunction, SubstitutedCheckpoint)

    @functools.wraps(init)
    def noting_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        swaps = active()
        if swaps and self._forward_cls not in own:
            rebind = functools.partial(_rebind, weakref.ref(self))
            swaps[-1].at_end = (*swaps[-1].at_end, rebind)

    node.__init__ = ours(noting_init)  # type: ignore[method-assign]


follow_custom_functions()
