"""RNNs in plain operations, where torch's fused ones cannot follow.

``torch.lstm`` and its kin have no rule for vmap, nor all of them for forward mode; and what torch
compiles of them has no gradient for an LSTM on CPU, and forgets the dropout between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.overrides import TorchFunctionMode

from fcall import _torch, errors

__all__ = ["PlainRNNs", "needs_plain_rnns", "with_plain_rnns"]

R = TypeVar("R")


def needs_plain_rnns(rnns: Sequence[nn.RNNBase], tensors: Iterable[Any]) -> bool:
    """Whether a call must go without torch's fused RNNs.

    Args:
        rnns: Those in the called module.
        tensors: Its weights and inputs, and what else there is.
    """
    if not rnns:
        return False
    if _torch.in_vmap_or_forward_mode():
        return True
    if not torch.compiler.is_dynamo_compiling():
        return False
    if any(rnn.dropout and rnn.training for rnn in rnns) or _torch.in_functorch_transform():
        return True
    needed = any(getattr(tensor, "requires_grad", False) for tensor in tensors)
    return needed and torch.is_grad_enabled()


class PlainRNNs(TorchFunctionMode):
    """A context in which RNNs are computed step by step, for vmap, forward mode and compilers.

    Equivalent to torch's operations, up to rounding.

    Raises:
        PackedSequenceError: an RNN is given a packed sequence (a ``RuntimeError``).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.lstm:
            return _layers(_lstm_step, *args)
        if func is torch.gru:
            return _layers(_gru_step, *args)
        if func is torch.rnn_tanh:
            return _layers(_tanh_step, *args)
        if func is torch.rnn_relu:
            return _layers(_relu_step, *args)
        return func(*args, **(kwargs or {}))


def with_plain_rnns(fn: Callable[..., R]) -> Callable[..., R]:
    """Return ``fn``, called in the context of :class:`PlainRNNs`."""

    def called(*args: Any, **kwargs: Any) -> R:
        with PlainRNNs():
            return fn(*args, **kwargs)

    return called


_State = tuple[Tensor, ...]
_Step = Callable[[Tensor, _State, "_Weights"], _State]


class _Weights:
    """The weights of one layer in one direction."""

    def __init__(self, weights: Sequence[Tensor], has_biases: bool) -> None:
        self.of_input, self.of_hidden, *more = weights
        self.input_bias: Tensor | None = None
        self.hidden_bias: Tensor | None = None
        if has_biases:
            self.input_bias, self.hidden_bias, *more = more
        self.projection = more[0] if more else None


def _layers(
    step: _Step,
    x: Tensor,
    initial: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout_between: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Do what ``torch.lstm(x, initial, weights, ...)`` does, with the steps of one kind of RNN.

    Args:
        step: Computes the next state from what the input contributes to it, and the last state.
        x: Inputs, ``(time, batch, input_size)``, or ``(batch, time, input_size)``.
        initial: A tensor ``(layers * directions, batch, size)``, or a tuple of them.
        weights: Of each layer and direction: of the input, of the state, two biases if there are
            any, and the projection if there is one.
        has_biases: Whether there are biases.
        num_layers: The number of layers.
        dropout_between: The probability with which outputs of a layer are zero for the next one.
        training: Whether that is done.
        bidirectional: Whether each layer has a second direction, backwards in time.
        batch_first: How ``x`` and the outputs are laid out.

    Returns:
        The outputs, and each tensor of the final state, laid out as the initial one.
    """
    if not isinstance(has_biases, bool):  # then it is an overload with other arguments
        errors.fail(errors.PackedSequenceError)
    initial_states = [initial] if isinstance(initial, Tensor) else list(initial)
    directions = 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    x = x.transpose(0, 1) if batch_first else x
    finals: list[_State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            own = _Weights(weights[i * count : (i + 1) * count], has_biases)
            state = tuple(initial[i] for initial in initial_states)
            contributions = linear(x, own.of_input, own.input_bias).unbind(0)
            hidden = []
            for contribution in reversed(contributions) if direction else contributions:
                state = step(contribution, state, own)
                hidden.append(state[0])
            outputs.append(torch.stack(hidden[::-1] if direction else hidden))
            finals.append(state)
        x = torch.cat(outputs, -1)
        if training and dropout_between and layer < num_layers - 1:
            x = dropout(x, dropout_between)
    x = x.transpose(0, 1) if batch_first else x
    return x, *[torch.stack(states) for states in zip(*finals)]


def _lstm_step(contribution: Tensor, state: _State, weights: _Weights) -> _State:
    hidden, cell = state
    gates = contribution + linear(hidden, weights.of_hidden, weights.hidden_bias)
    take, keep, new, give = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
    hidden = give.sigmoid() * cell.tanh()
    if weights.projection is not None:
        hidden = linear(hidden, weights.projection)
    return hidden, cell


def _gru_step(contribution: Tensor, state: _State, weights: _Weights) -> _State:
    (hidden,) = state
    of_hidden = linear(hidden, weights.of_hidden, weights.hidden_bias)
    reset, keep, new = contribution.chunk(3, -1)
    hidden_reset, hidden_keep, hidden_new = of_hidden.chunk(3, -1)
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    keep = (keep + hidden_keep).sigmoid()
    return (new + keep * (hidden - new),)


def _tanh_step(contribution: Tensor, state: _State, weights: _Weights) -> _State:
    return ((contribution + linear(state[0], weights.of_hidden, weights.hidden_bias)).tanh(),)


def _relu_step(contribution: Tensor, state: _State, weights: _Weights) -> _State:
    return ((contribution + linear(state[0], weights.of_hidden, weights.hidden_bias)).relu(),)
