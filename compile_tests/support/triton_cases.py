"""The functions whose CUDA code is looked at: ours, the plain one beside it, and what is right.

Small, since Triton's interpreter runs them: a block of a residual network and the norm of the next,
so that pointwise operators, reductions and matmuls all have neighbours to be fused with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

import fcall
from compile_tests.support.oracle import in_float64, loaded

BATCH, WIDTH, HIDDEN, RATE = 8, 16, 32, 0.1

Values = dict[str, Tensor]


class Block(nn.Module):
    """``(batch, WIDTH) -> (batch, WIDTH)``, residual: a norm, two linear layers, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Case(NamedTuple):
    """A function that makes calls, and how to tell whether it is right."""

    ours: Callable[..., Any]
    args: tuple[Any, ...]
    expected: Callable[[], Any]
    """Computes what :meth:`result` is to return, in float64, eagerly and without fcall."""
    plain: Callable[..., Any] | None = None
    """The same without fcall: modules that own their weights, or torch.func."""
    plain_args: tuple[Any, ...] = ()
    with_fusion_off: bool = True
    """Whether it is to be generated with fusion off, too."""
    run: bool = True
    """Whether it is to be run."""

    def result(self, out: Any, args: tuple[Any, ...]) -> Any:
        """Return what a call gave: ``out``, or the loss with the gradients; and the buffers."""
        learned = [arg for arg in args if isinstance(arg, dict) and _needs_gradient(arg)]
        if not learned:
            return out
        out.backward()
        gradients = [{name: value.grad for name, value in values.items()} for values in learned]
        buffers = [arg for arg in args if isinstance(arg, dict) and not _needs_gradient(arg)]
        return (out.detach(), *gradients, *buffers)


def _needs_gradient(values: Values) -> bool:
    return any(value.requires_grad for value in values.values())


def cases() -> dict[str, Case]:
    """Return all, with the same values each time."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.LayerNorm(WIDTH))
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    made = {
        "forward": _forward(model, x),
        "traced forward": _traced_forward(model, x),
        "training": _training(model, x, y),
        "step": _step(model, x, y),
        "per-sample gradients": _per_sample(model, x, y),
        "two calls": _two_calls(model, x, y),
        "buffers": _buffers(x, y),
    }
    for size in (2, 5):
        two = _ensemble(model, x, size), _ensemble_step(model, x, y, size)
        if size > 2:  # only to compare the launches
            only = {"plain": None, "with_fusion_off": False, "run": False}
            two = tuple(case._replace(**only) for case in two)
        made[f"ensemble of {size}"], made[f"step of an ensemble of {size}"] = two
    return made


def _values(model: nn.Module, *, members: int | None = None, learned: bool = False) -> Values:
    """Random values for each parameter, stacked for an ensemble."""
    lead = () if members is None else (members,)
    return {
        name: (p.detach() + 0.1 * torch.randn(*lead, *p.shape)).requires_grad_(learned)
        for name, p in model.named_parameters()
    }


def _owning(model: nn.Module, values: Values) -> nn.Module:
    """A copy of ``model``, in its dtype, that owns ``values``."""
    twin = copy.deepcopy(model)
    twin.load_state_dict({n: v.detach() for n, v in values.items()}, strict=False)
    return twin


def _member(values: Values, i: int) -> Values:
    return {name: value[i] for name, value in values.items()}


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, y)


def _gradients(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Values]:
    """The loss of a module in float64, and its gradients by name, by plain autograd."""
    loss = _loss(module(in_float64(x)), in_float64(y))
    named = dict(module.named_parameters())
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def _sgd(model: nn.Module, values: Values, x: Tensor, y: Tensor) -> tuple[Values, Tensor]:
    """The weights after a step of ``torch.optim.SGD``, and the loss before it."""
    twin = loaded(model, values)
    optimizer = torch.optim.SGD(twin.parameters(), lr=RATE)
    loss = _loss(twin(in_float64(x)), in_float64(y))
    loss.backward()
    optimizer.step()
    return {n: p.detach() for n, p in twin.named_parameters()}, loss.detach()


def _forward(model: nn.Module, x: Tensor) -> Case:
    values = _values(model)
    return Case(
        ours=lambda p, x: fcall.functional_call(model, p, x),
        args=(values, x),
        expected=lambda: loaded(model, values)(in_float64(x)).detach(),
        plain=_owning(model, values).requires_grad_(False),
        plain_args=(x,),
    )


def _traced_forward(model: nn.Module, x: Tensor) -> Case:
    case = _forward(model, x)
    return case._replace(ours=fcall.trace(model, *case.args), with_fusion_off=False, run=False)


def _training(model: nn.Module, x: Tensor, y: Tensor) -> Case:
    values = _values(model, learned=True)
    twin = _owning(model, values)
    return Case(
        ours=lambda p, x, y: _loss(fcall.functional_call(model, p, x), y),
        args=(values, x, y),
        expected=lambda: _gradients(loaded(model, values), x, y),
        plain=lambda x, y: _loss(twin(x), y),
        plain_args=(x, y),
    )


def _step_of(call: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    def step(p: Values, x: Tensor, y: Tensor) -> tuple[Values, Tensor]:
        gradients, loss = grad_and_value(lambda p: _loss(call(model, p, (x,)), y))(p)
        return {name: value - RATE * gradients[name] for name, value in p.items()}, loss

    return step


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Case:
    values = _values(model)
    return Case(
        ours=_step_of(fcall.functional_call, model),
        args=(values, x, y),
        expected=lambda: _sgd(model, values, x, y),
        plain=_step_of(torch.func.functional_call, model),
        plain_args=(values, x, y),
    )


def _ensemble(model: nn.Module, x: Tensor, size: int) -> Case:
    values = _values(model, members=size)

    def expected() -> Tensor:
        twins = [loaded(model, _member(values, i)) for i in range(size)]
        return torch.stack([twin(in_float64(x)).detach() for twin in twins])

    return Case(
        ours=lambda p, x: vmap(lambda p: fcall.functional_call(model, p, x))(p),
        args=(values, x),
        expected=expected,
        plain=lambda p, x: vmap(lambda p: torch.func.functional_call(model, p, (x,)))(p),
        plain_args=(values, x),
    )


def _ensemble_step(model: nn.Module, x: Tensor, y: Tensor, size: int) -> Case:
    values = _values(model, members=size)

    def expected() -> tuple[Values, Tensor]:
        steps = [_sgd(model, _member(values, i), x, y) for i in range(size)]
        weights = {name: torch.stack([step[0][name] for step in steps]) for name in values}
        return weights, torch.stack([step[1] for step in steps])

    ours, plain = (_step_of(f, model) for f in (fcall.functional_call, torch.func.functional_call))
    return Case(
        ours=vmap(ours, in_dims=(0, None, None)),
        args=(values, x, y),
        expected=expected,
        plain=vmap(plain, in_dims=(0, None, None)),
        plain_args=(values, x, y),
    )


def _per_sample(model: nn.Module, x: Tensor, y: Tensor) -> Case:
    values = _values(model)

    def of(call: Callable[..., Any]) -> Callable[..., Any]:
        def loss(p: Values, x: Tensor, y: Tensor) -> Tensor:
            return _loss(call(model, p, (x,)), y)

        return vmap(grad(loss), in_dims=(None, 0, 0))

    def expected() -> Values:
        twin = loaded(model, values)
        rows = [_gradients(twin, x[i], y[i])[1] for i in range(BATCH)]
        return {name: torch.stack([row[name] for row in rows]) for name in values}

    return Case(
        ours=of(fcall.functional_call),
        args=(values, x, y),
        expected=expected,
        plain=of(torch.func.functional_call),
        plain_args=(values, x, y),
    )


def _two_calls(model: nn.Module, x: Tensor, y: Tensor) -> Case:
    """One module called twice, with other weights each time, the second on the first's output."""
    first, second = _values(model, learned=True), _values(model, learned=True)
    twins = nn.Sequential(_owning(model, first), _owning(model, second))

    def ours(p: Values, q: Values, x: Tensor, y: Tensor) -> Tensor:
        hidden = fcall.functional_call(model, p, x)
        return _loss(fcall.functional_call(model, q, hidden), y)

    def expected() -> tuple[Tensor, Values, Values]:
        twin = nn.Sequential(loaded(model, first), loaded(model, second))
        loss, gradients = _gradients(twin, x, y)
        of_first, of_second = (
            {name: gradients[f"{i}.{name}"] for name in names}
            for i, names in enumerate((first, second))
        )
        return loss, of_first, of_second

    return Case(
        ours=ours,
        args=(first, second, x, y),
        expected=expected,
        plain=lambda x, y: _loss(twins(x), y),
        plain_args=(x, y),
    )


def _buffers(x: Tensor, y: Tensor) -> Case:
    """A batch norm in training: buffers that the call writes in place."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU())
    model.append(nn.Linear(HIDDEN, WIDTH))
    values = _values(model, learned=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    twin = _owning(model, values)

    def expected() -> tuple[Tensor, Values, Values]:
        twin = loaded(model, values)
        loss, gradients = _gradients(twin, x, y)
        return loss, gradients, dict(twin.named_buffers())

    return Case(
        ours=lambda p, b, x, y: _loss(fcall.functional_call(model, (p, b), x), y),
        args=(values, buffers, x, y),
        expected=expected,
        plain=lambda x, y: _loss(twin(x), y),
        plain_args=(x, y),
        with_fusion_off=False,
    )
