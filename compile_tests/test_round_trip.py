"""Random modules, traced, exported, saved, loaded, packaged and run: the same as an eager call."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.oracle import assert_close, loaded, state_of
from compile_tests.support.random_modules import WIDTH, Calls, random_module

pytestmark = pytest.mark.compiled

Run = Callable[[dict[str, Tensor], Tensor], Any]


def _can_be_a_graph(module: nn.Module) -> bool:
    """Whether it keeps no count outside of buffers, and torch makes the right graph of it."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    return not (
        any(isinstance(m, Calls) for m in module.modules())
        or any(norm.momentum is None and norm.training for norm in norms)
        # One tensor written twice: torch's own decomposition loses one of the two.
        or any(norm.running_mean is norm.running_var for norm in norms)
    )


def module_for(seed: int) -> nn.Module:
    """Return a module, for each seed another, that a graph can stand for."""
    rng = Random(seed)
    while not _can_be_a_graph(module := random_module(rng)):
        pass
    return module


def check(module: nn.Module, runs: dict[str, Run]) -> None:
    for seed in (1, 2):
        x = torch.rand(3, WIDTH, dtype=torch.float64)
        values = state_of(module, seed=seed)
        torch.manual_seed(seed)
        twin = loaded(module, values)
        expected = twin(x)
        after = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        for name, run in runs.items():
            given = copy.deepcopy(values)
            torch.manual_seed(seed)
            try:
                assert_close(run(given, x), expected)
                assert_close(given, {key: after[key] for key in given})
            except AssertionError as error:
                raise AssertionError(f"{name} of {module}: {error}") from error


def from_disk(program: fcall.Program) -> Run:
    buffer = io.BytesIO()
    torch.export.save(program.exported(), buffer)
    buffer.seek(0)
    run = torch.export.load(buffer).module()

    def call(given: dict[str, Tensor], x: Tensor) -> Any:
        out, state = run(given, x)
        given.update(state)
        return out

    return call


def check_without_package(seed: int) -> None:
    module = module_for(seed)
    program = fcall.trace(module, state_of(module), torch.rand(3, WIDTH, dtype=torch.float64))
    with torch.no_grad():
        check(
            module,
            {"trace": program, "core": program.decompose(), "saved": from_disk(program)},
        )


@pytest.mark.parametrize("seed", range(12))
def test_traced_and_saved(seed: int) -> None:
    check_without_package(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_traced_and_saved_many(seed: int) -> None:
    check_without_package(seed)


def check_package(seed: int, path: Path) -> None:
    module = module_for(seed)
    for dropout in module.modules():
        if isinstance(dropout, nn.Dropout):  # compiled code draws other numbers
            dropout.eval()
    program = fcall.trace(module, state_of(module), torch.rand(3, WIDTH, dtype=torch.float64))
    runner = fcall.load(fcall.package(program, path))
    with torch.no_grad():
        check(module, {"package": runner})


@pytest.mark.inductor
@pytest.mark.parametrize("seed", [1, 2])
def test_packaged(seed: int, tmp_path: Path) -> None:
    check_package(seed, tmp_path / "random.pt2")


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("seed", range(300, 320))
def test_packaged_many(seed: int, tmp_path: Path) -> None:
    check_package(seed, tmp_path / "random.pt2")
