"""``Ensemble`` in ``DistributedDataParallel``: two processes see each half of a batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fcall

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch is built without it"),
]
WORLD = 2


def make() -> tuple[fcall.Ensemble, torch.Tensor]:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(3)]
    return fcall.Ensemble([model.eval() for model in models]), torch.rand(8, 3)


def step(rank: int, folder: str, interface: str) -> None:
    """One step of training, in a process of its own."""
    import os

    os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    ensemble, x = make()
    parallel = DistributedDataParallel(ensemble)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    parallel(x.chunk(WORLD)[rank]).square().mean().backward()
    optimizer.step()
    torch.save(ensemble.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_a_step_in_two_processes(tmp_path: Path) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    torch.multiprocessing.spawn(step, (str(tmp_path), loopback), nprocs=WORLD)
    ensemble, x = make()
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    ensemble(x).square().mean().backward()
    optimizer.step()
    for rank in range(WORLD):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), ensemble.state_dict())
