"""The modules that several tests call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fcall


class MLP(nn.Module):
    """Two layers, ``(batch, 3) -> (batch, 2)``; with a method other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(3, 4)
        self.l2 = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.l2(self.encode(x)) * scale

    def encode(self, x: Tensor) -> Tensor:
        return self.l1(x).tanh()


class Normed(nn.Module):
    """A convnet with batch norm, ``(batch, 2, 6, 6) -> (batch, 3)``: buffers written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Counter(nn.Module):
    """Reassigns a buffer: the example of the torch documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("foo", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.foo = self.foo + 1
        return x + self.foo


class Tied(nn.Module):
    """An embedding model whose output weight is its input weight, ``(batch,) -> (batch, 7)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(tokens)).tanh())


class Shared(nn.Module):
    """One submodule under two names, ``(batch, 3) -> (batch, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Symmetric(nn.Module):
    """A parametrization: the symmetric matrix with the given upper triangle."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.triu()


def parametrized() -> nn.Module:
    """Return an MLP of ``(batch, 3) -> (batch, 3)`` whose first weight is symmetric."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    parametrize.register_parametrization(module[0], "weight", Symmetric())
    return module


class Attention(nn.Module):
    """A pre-norm attention block, ``(batch, tokens, 8) -> (batch, tokens, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / (width // 2) ** 0.5).softmax(-1)
        return x + self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, width))


class PythonState(nn.Module):
    """Counts its calls in Python: a body that cannot be captured as a subgraph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class Recurrent(nn.Module):
    """An LSTM and a head, ``(batch, time, 3) -> (batch, time, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Affine(nn.Module):
    """``(batch, 1) -> (batch, 1)``: a submodule, a buffer, and an attribute that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("shift", torch.ones(1))
        self.rate = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift


class Plain(nn.Module):
    """Tensors that are not registered: of the instance, of the class, behind a property."""

    scale = torch.tensor(3.0)  # the class's

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.plain = torch.tensor(5.0)
        self._stored = torch.tensor(7.0)

    @property
    def stored(self) -> Tensor:
        return self._stored

    @stored.setter
    def stored(self, value: Tensor) -> None:
        self._stored = value

    def forward(self) -> list[float]:
        names = ("weight", "plain", "scale", "_stored", "extra")
        return [getattr(self, name, torch.tensor(-1)).item() for name in names]


class Owner(nn.Module):
    """Calls a submodule of its own with halved weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor) -> Tensor:
        halved = {name: value / 2 for name, value in self.inner.named_parameters()}
        return fcall.functional_call(self.inner, halved, x)


EXAMPLES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP": lambda: (MLP(), torch.rand(5, 3)),
    "Normed": lambda: (Normed(), torch.rand(4, 2, 6, 6)),
    "Normed in eval": lambda: (Normed().eval(), torch.rand(4, 2, 6, 6)),
    "Counter": lambda: (Counter(), torch.rand(3)),
    "Tied": lambda: (Tied(), torch.arange(5)),
    "Shared": lambda: (Shared(), torch.rand(2, 3)),
    "parametrized": lambda: (parametrized(), torch.rand(2, 3)),
    "Attention": lambda: (Attention(), torch.rand(2, 4, 8)),
}
"""Models that can be captured in a graph, each with an input."""
