"""Generates the CUDA code of all cases, and compiles it: ``python -m ...run_generated FILE``.

In a process of its own, since all of it sees a GPU that is not there.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fcall
from compile_tests.support.triton_cases import WIDTH, cases
from fcall._torch import ahead, triton
from fcall.kernels import Built, Generated, Kernel, cubins, generate


class Record(NamedTuple):
    """What was generated for one case."""

    ours: Generated
    plain: Generated | None
    unfused: Generated | None
    """Ours, with fusion off."""
    routes: list[str]
    """The kinds of our calls."""


class Records(NamedTuple):
    """What was generated for all cases, by name, and what the kernels were compiled to."""

    of: dict[str, Record]
    cubins: dict[Kernel, tuple[Built, ...]]
    huge: Generated
    """A layer whose weights no machine's memory would hold, from fake tensors."""
    random: Generated
    """Dropout, forward and backward."""
    spilling: tuple[Built, ...]
    """A kernel that was made to need more registers than there are."""


def main(path: Path) -> None:
    """Write :class:`Records` to ``path``."""
    records: dict[str, Record] = {}
    for name, case in cases().items():
        with fcall.record_routes() as routes:
            ours = generate(case.ours, *case.args)
        plain = generate(case.plain, *case.plain_args) if case.plain else None
        options = triton.WITHOUT_FUSION
        unfused = generate(case.ours, *case.args, options=options) if case.with_fusion_off else None
        records[name] = Record(ours, plain, unfused, [route.kind for route in routes])
    kernels = dict.fromkeys(k for record in records.values() for k in record.ours.kernels)
    built = {kernel: cubins(kernel) for kernel in kernels}
    spilling = _spilling(records["forward"].ours.kernels[0])
    path.write_bytes(pickle.dumps(Records(records, built, _huge(), _random(), spilling)))


def _huge() -> Generated:
    module = nn.Linear(2**20, 2**20, device="meta")
    with ahead.fake_mode():
        weights = {name: torch.empty(tuple(p.shape)) for name, p in module.named_parameters()}
        x = torch.empty(16, 2**20)
    return generate(lambda p, x: fcall.functional_call(module, p, x).relu(), weights, x)


def _random() -> Generated:
    module = nn.Sequential(nn.Linear(16, 16), nn.Dropout())
    weights = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x = torch.empty(8, 16)
    return generate(lambda p, x: fcall.functional_call(module, p, x).sum(), weights, x)


def _spilling(kernel: Kernel) -> tuple[Built, ...]:
    """Build the norm of WIDTH values, which a few threads hold in registers, for 4096 of them."""
    source = kernel.source
    for setting in ("R0_BLOCK: tl.constexpr = {}\n", "r0_numel = {}\n"):
        assert setting.format(WIDTH) in source
        source = source.replace(setting.format(WIDTH), setting.format(4096))
    return cubins(dataclasses.replace(kernel, source=source))


if __name__ == "__main__":
    # By its name: what is pickled here is found there.
    from compile_tests.support import run_generated

    run_generated.main(Path(sys.argv[1]))
