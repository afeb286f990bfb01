"""Random modules, for the fuzzer: trees of layers with all that makes a functional call hard.

Each maps ``(batch, 4)`` to ``(batch, 4)`` in float64, so that any can follow any, and what differs
from the oracle by more than rounding is wrong. All choices come from one ``random.Random``.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fcall
from compile_tests.support.models import Symmetric
from compile_tests.support.slots import set_tensor, slots_of

WIDTH = 4


def random_module(rng: Random) -> nn.Module:
    """Return a random tree of modules, in training or in evaluation."""
    torch.manual_seed(rng.randrange(100))
    module = _tree(rng, depth=rng.randrange(4)).double()  # before ties, which it undoes of buffers
    for _ in range(rng.randrange(5)):
        rng.choice([_share, _tie, _tie, _parametrize, _hook, _leave_out])(module, rng)
    return module.train(rng.random() < 0.6)


# --- layers -------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Reassigns a buffer in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x / self.steps


class Rebuilt(nn.Module):
    """Deletes a buffer in each call and registers it again, with another value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.ones(WIDTH))
        self.register_buffer("second", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first
        del self.first
        self.register_buffer("first", first + 1)
        return x / self.first + self.second


class Mean(nn.Module):
    """Writes a buffer in place, one that is in no state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return (x - self.mean) * self.scale


class Plain(nn.Module):
    """Has a tensor that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.rand(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.plain


class Calls(nn.Module):
    """Counts its calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight / self.calls


class Recurrent(nn.Module):
    """Takes the batch for time."""

    def __init__(self, cell: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.cell = cell(WIDTH, WIDTH, num_layers=layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]  # type: ignore[no-any-return]


def _layer(rng: Random) -> nn.Module:
    make = rng.choice(
        [
            lambda: nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7),
            lambda: nn.Linear(WIDTH, WIDTH),
            lambda: nn.LayerNorm(WIDTH, bias=rng.random() < 0.5),
            lambda: nn.BatchNorm1d(WIDTH, momentum=rng.choice([0.1, None])),
            lambda: nn.PReLU(rng.choice([1, WIDTH])),
            lambda: Recurrent(rng.choice([nn.RNN, nn.GRU, nn.LSTM]), rng.choice([1, 2])),
            Steps,
            Rebuilt,
            Mean,
            Plain,
            Calls,
        ]
    )
    return make()


# --- what holds them ----------------------------------------------------------------------------


class Residual(nn.Module):
    """Adds what its child returns."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.child(x)).tanh()


class Branches(nn.Module):
    """Multiplies what its children return, and a parameter of its own, named like others."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"left": left, "right": right})
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.branches["left"](x).tanh() * self.branches["right"](x) + self.weight


class Twice(nn.Module):
    """Calls its child twice."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.child(x).tanh())


class Inner(nn.Module):
    """Calls its child functionally, with its own parameters: a call in the call."""

    functional = True
    """Whether it does. The oracle has a twin that does not."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        if not self.functional:
            return self.child(x)  # type: ignore[no-any-return]
        own = dict(self.child.named_parameters())
        return fcall.functional_call(self.child, own, x)  # type: ignore[no-any-return]


def _tree(rng: Random, depth: int) -> nn.Module:
    if depth == 0:
        return _layer(rng)
    kind = rng.choice([nn.Sequential, nn.Sequential, Residual, Branches, Twice, Inner])
    counts = {nn.Sequential: rng.randint(1, 3), Branches: 2}
    return kind(*[_tree(rng, depth - 1) for _ in range(counts.get(kind, 1))])


# --- what makes it hard -------------------------------------------------------------------------


def _share(module: nn.Module, rng: Random) -> None:
    """Put one of the layers in a second place."""
    places = [
        (parent, key)
        for parent in module.modules()
        if isinstance(parent, (nn.Sequential, nn.ModuleDict, Residual, Twice, Inner))
        for key, child in parent._modules.items()
        if not isinstance(child, parametrize.ParametrizationList)
    ]
    layers = [m for parent, key in places if _is_layer(m := parent.get_submodule(key))]
    if layers:
        parent, key = rng.choice(places)
        parent._modules[key] = rng.choice(layers)


def _is_layer(module: nn.Module) -> bool:
    known = (Recurrent, Steps, Rebuilt, Mean, Plain, Calls, nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
    return isinstance(module, known)


def _tie(module: nn.Module, rng: Random) -> None:
    """Make two parameters, or two buffers, one tensor."""
    slots = [s for s in slots_of(module).values() if s.store in ("_parameters", "_buffers")]
    pairs = [
        (one, other)
        for one in slots
        for other in slots
        if one != other and one.store == other.store and _alike(one.tensor, other.tensor)
    ]
    if pairs:
        one, other = rng.choice(pairs)
        set_tensor(other, one.tensor)


def _alike(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return (one.shape, one.dtype) == (other.shape, other.dtype)


PARAMETRIZATIONS: list[Callable[[nn.Module], Any]] = [
    lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
]


def _parametrize(module: nn.Module, rng: Random) -> None:
    layers = [
        m
        for m in module.modules()
        if type(m) is nn.Linear and isinstance(m._parameters.get("weight"), Tensor)
    ]
    if layers:
        rng.choice(PARAMETRIZATIONS)(rng.choice(layers))


def _hook(module: nn.Module, rng: Random) -> None:
    owner = rng.choice([m for m in module.modules() if m is module or _is_layer(m)])
    if rng.random() < 0.5:
        owner.register_forward_pre_hook(halve_the_input)
    else:
        owner.register_forward_hook(add_the_parameters)


def halve_the_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Act as a forward pre-hook."""
    return (args[0] / 2,)


def add_the_parameters(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Act as a forward hook that reads the module."""
    own = [p.mean() for p in module.parameters(recurse=False)]
    return out + torch.stack(own).sum() if own else out


def _leave_out(module: nn.Module, rng: Random) -> None:
    """Register a bias as None."""
    layers = [m for m in module.modules() if type(m) is nn.Linear and m.bias is not None]
    if layers:
        rng.choice(layers).bias = None  # type: ignore[assignment]
