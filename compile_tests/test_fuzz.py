"""Random calls of random modules against the oracle. `make fuzz` runs many more of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fcall
from compile_tests import fuzz
from compile_tests.support import differential, ways
from compile_tests.support.compiled import check_compiled
from compile_tests.support.oracle import state_of
from compile_tests.support.random_modules import (
    WIDTH,
    Inner,
    Rebuilt,
    Steps,
    Twice,
    random_module,
)
from compile_tests.support.slots import slots_of

bounded = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(bounded, max_examples=1000)
@given(st.randoms(use_true_random=False))
def test_eager(rng: Random) -> None:
    differential.check(rng)


SEEDS = [s for s in range(30) if not differential.known_to_fail(random_module(Random(s)))][:10]


@pytest.mark.compiled
@pytest.mark.parametrize("seed", SEEDS)
def test_compiled(seed: int) -> None:
    differential.check(Random(seed), ways.compiled, faults=False)


def test_the_generator_makes_all_that_is_hard() -> None:
    """A fuzzer whose modules or calls are all alike finds nothing."""
    seen: Counter[str] = Counter()
    for seed in range(300):
        rng = Random(seed)
        module = random_module(rng)
        call = differential.random_call(rng, module, faults=True)
        slots = slots_of(module)
        owners = list(module.modules())
        by_tensor = Counter(
            id(s.tensor) for s in {*slots.values()} if s.store in ("_parameters", "_buffers")
        )
        seen.update(type(owner).__name__ for owner in owners)
        seen.update({slots[name].store for name in call.values})
        seen["tied"] += any(count > 1 for count in by_tensor.values())
        seen["shared"] += len(owners) < len(list(module.named_modules(remove_duplicate=False)))
        seen["hooked"] += any(m._forward_hooks or m._forward_pre_hooks for m in owners)
        seen["none"] += any(slot.tensor is None for slot in slots.values())
        seen["strict"] += call.strict
        seen["untied"] += not call.tie_weights
        seen["fails"] += call.fails
        seen["a part"] += 0 < len(call.values) < len(slots)
    # fmt: off
    expected = [
        "LSTM", "GRU", "RNN", "Linear", "LayerNorm", "BatchNorm1d", "Steps", "Rebuilt", "Mean",
        "Plain", "Calls", "Residual", "Branches", "Twice", "Inner", "ParametrizationList",
        "_parameters", "_buffers", "plain", "parametrized", "tied", "shared", "hooked", "none",
        "strict", "untied", "fails", "a part",
    ]
    # fmt: on
    assert {name: seen[name] for name in expected if seen[name] < 3} == {}


def _forgets_ties(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    return fcall.functional_call(module, values, x, tie_weights=False)


def _forgets_to_write_back(
    module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool
) -> Any:
    return fcall.functional_call(module, dict(values), x, tie_weights=ties)


def _cuts_gradients(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    cuts = {id(value): value.detach() for value in values.values()}
    cut = {name: cuts[id(value)] for name, value in values.items()}
    return fcall.functional_call(module, cut, x, tie_weights=ties)


def _forgets_a_value(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    part = dict(list(values.items())[1:])
    return fcall.functional_call(module, part, x, tie_weights=ties)


def _as_torch_does(module: nn.Module, values: Any, x: Tensor, ties: bool, strict: bool) -> Any:
    return torch.func.functional_call(module, values, (x,), tie_weights=ties)


@pytest.mark.parametrize(
    "run",
    [_forgets_ties, _forgets_to_write_back, _cuts_gradients, _forgets_a_value, _as_torch_does],
)
def test_what_is_wrong_is_found(run: ways.Run) -> None:
    """And torch's own functional_call is found wrong."""
    assert _finds_something(run)


@pytest.mark.parametrize("run", [way for way in ways.WAYS if way != ways.in_a_block])
def test_each_way_finds_what_is_wrong(run: ways.Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(fcall, "functional_call", torch.func.functional_call)
    assert _finds_something(run)


def test_wrong_gradients_of_transforms_are_found(monkeypatch: Any) -> None:
    monkeypatch.setattr(fcall.func, "grad", _wrong_for_the_values)
    assert _finds_something(ways.in_grad)
    assert _finds_something(ways.in_vmap_of_grad)


def _wrong_for_the_values(fn: Any, argnums: Any, **options: Any) -> Any:
    def gradients(tensors: Any, x: Tensor) -> Any:
        (_, of_x), rest = torch.func.grad(fn, argnums, **options)(tensors, x)
        return (tensors, of_x), rest

    return gradients


def _finds_something(run: ways.Run) -> bool:
    for seed in range(150):
        try:
            differential.check(Random(seed), run, faults=False)
        except (AssertionError, RuntimeError, ValueError, KeyError, TypeError):
            return True
    return False


def test_a_failure_can_be_replayed(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(differential, "WAYS", [_cuts_gradients])
    assert fuzz.main(["--seed", "1000", "--minutes", "1"]) == 1
    printed = capsys.readouterr().out
    seed = printed.split("--seed ")[1].split()[0]
    assert "AssertionError" in printed
    assert fuzz.main(["--seed", seed, "--only"]) == 1
    assert f"--seed {seed}" in capsys.readouterr().out
    monkeypatch.undo()
    assert fuzz.main(["--seed", seed, "--only"]) == 0


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "compile_tests.fuzz", "--minutes", "0.05", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from seed 7 on" in done.stdout


# --- what it found ------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("module", "routes"),
    [
        # A buffer given to the outer call and reassigned in the inner one, which is not given it.
        (Inner(Steps()), ["inlined", "operator"]),
        (Twice(Inner(Steps())), ["inlined", "inlined", "operator"]),
        # Deleted and registered again.
        (Rebuilt(), ["operator"]),
        (Inner(Rebuilt()), ["inlined", "operator"]),
    ],
)
def test_compiled_calls_of(module: nn.Module, routes: list[str]) -> None:
    values, x = state_of(module, seed=1), torch.rand(3, WIDTH)
    call = lambda p, x: (fcall.functional_call(module, p, x), p)  # noqa: E731, p is written to
    check_compiled(call, values, x, module=module, route=routes)
