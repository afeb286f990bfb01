"""What does it cost to serve K fine-tuned variants of one encoder, from many threads?

A variant differs from the base by a matrix of low rank for each weight matrix. One package has the
base, takes the small matrices as its weights, and merges them in its graph. The others have merged
them before, and a copy of the encoder for each variant. A call of a contender answers the same
number of requests, whatever K, in eight threads. What it keeps, of weights and of compiled code, is
said by ``kept_bytes``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fcall
from perf import bench
from perf.models import random, weights_for, with_weights

VARIANTS = (1, 4, 16)
THREADS = 8
REQUESTS = 16
RANK = 4


class Encoder(nn.TransformerEncoder):
    """A class of its own: Dynamo compiles each instance of one of torch.nn's anew."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class LowRank(nn.Module):
    """A base with a difference of low rank added to each of its weight matrices."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in base.named_parameters():
            if weight.dim() == 2:
                key = name.replace(".", "/")
                self.down[key] = nn.Parameter(torch.randn(RANK, weight.shape[1]) / 16)
                self.up[key] = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, x: Tensor) -> Tensor:
        return fcall.functional_call(self.base, self.merged(), x)  # type: ignore[no-any-return]

    def merged(self) -> dict[str, Tensor]:
        """Return the weight matrices of the variant."""
        own = dict(self.base.named_parameters())
        names = {key: key.replace("/", ".") for key in self.down}
        return {name: own[name] + self.up[k] @ self.down[k] for k, name in names.items()}


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    width, depth, length = (16, 1, 4) if quick else (384, 6, 32)  # of all-MiniLM-L6
    layers = nn.TransformerEncoderLayer(width, max(width // 32, 1), 4 * width, 0.0)
    base = Encoder(layers, depth, enable_nested_tensor=False).eval()
    model, x = LowRank(base).eval(), random(length, 1, width)
    small = [name for name, _ in model.named_parameters() if not name.startswith("base.")]
    of_base = _bytes(dict(base.named_parameters()))
    rows = []
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        values = dict(model.named_parameters())
        serve, file_size = _package({name: values[name] for name in small}, model, x, folder, quick)
        for count in VARIANTS[:2] if quick else VARIANTS:
            torch.compiler.reset()
            variants = [
                {name: value for name, value in weights_for(model).items() if name in small}
                for _ in range(count)
            ]
            calls = _calls(model, variants, x, "eager" if quick else "inductor")
            calls["fcall, one package"] = partial(_call_package, serve, variants, x)
            for call in calls.values():
                for number in range(count):
                    call(number)
            contenders = {name: _requests(pool, call, count) for name, call in calls.items()}
            found = bench.measure(
                contenders, panel=f"{REQUESTS} requests", n=count, quick=quick, memory=False
            )
            of_variants = sum(map(_bytes, variants))
            kept = dict.fromkeys(contenders, count * of_base)
            kept["fcall, one package"] = of_base + file_size + of_variants
            rows += [row | {"kept_bytes": kept[row["contender"]]} for row in found]
    return bench.record(__doc__, "variants", rows)


def _calls(
    model: LowRank, variants: list[dict[str, Tensor]], x: Tensor, backend: str
) -> dict[str, Callable[[int], Tensor]]:
    """Return who answers with the weights merged before, each variant by a copy of its own."""
    own = dict(model.named_parameters())
    merged = [with_weights(model, {**own, **variant}).merged() for variant in variants]
    base = model.base.state_dict()
    copies = [with_weights(model.base, {**base, **weights}) for weights in merged]
    compiled = [torch.compile(copy, backend=backend) for copy in copies]
    return {
        "torch.func": lambda i: torch.func.functional_call(copies[i], merged[i], (x,)),
        "copies, Inductor": lambda i: compiled[i](x),
    }


def _call_package(
    serve: Callable[..., Tensor], variants: list[dict[str, Tensor]], x: Tensor, number: int
) -> Tensor:
    return serve(variants[number], x)


def _package(
    example: dict[str, Tensor], model: nn.Module, x: Tensor, folder: str, quick: bool
) -> tuple[Callable[..., Tensor], int]:
    """Return what answers a request, and the size of its code in bytes."""
    program = fcall.trace(model, example, x)
    if quick:
        return program, 0
    path = fcall.package(program, Path(folder) / "encoder.pt2")
    of_defaults = _bytes(program.defaults)
    return fcall.load(path, num_runners=THREADS), path.stat().st_size - of_defaults


def _requests(
    pool: ThreadPoolExecutor, call: Callable[[int], Tensor], count: int
) -> Callable[[], list[Tensor]]:
    def answer(number: int) -> Tensor:
        with torch.no_grad():
            return call(number % count)

    return lambda: list(pool.map(answer, range(REQUESTS)))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


if __name__ == "__main__":
    bench.run("serving", main)
