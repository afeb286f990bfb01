"""Calls on a GPU, beside the same calls on the CPU, so that the tests are known to be sound.

They need torch, Triton, NumPy and pytest alone: in a checkout that is not installed,
``python -m pytest -m cuda compile_tests/test_cuda*.py`` runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fcall
from compile_tests.support.compiled import backward, capture, fresh, gradients
from compile_tests.support.devices import (
    Values,
    calling,
    example,
    inductor,
    on,
    values_of,
    with_inductor,
)
from compile_tests.support.models import EXAMPLES
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from compile_tests.support.threads import alive, run

CALLS: dict[str, Callable[..., Any]] = {
    "torch.func": torch.func.functional_call,
    "fcall": fcall.functional_call,
}


# --- Values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_eager(device: str, name: str) -> None:
    module, x = example(name, device)
    given, same = (values_of(module, 1, learned=True) for _ in range(2))
    twin = loaded(module, same)
    with unchanged(module):
        out = fcall.functional_call(module, given, x)
        backward(out)
    expected = twin(in_float64(x))
    backward(expected)
    on(device, (out, given))
    assert_close(out, expected, dtype=torch.float32)
    learned = [given[n] for n, _ in module.named_parameters()]
    assert_close(gradients(learned), gradients(list(twin.parameters())), dtype=torch.float32)
    assert_close(
        {n: given[n] for n, _ in module.named_buffers()},
        dict(twin.named_buffers()),
        dtype=torch.float32,
    )


@with_inductor
@pytest.mark.parametrize("name", ["MLP", "Normed", "Attention", "Tied"])
def test_the_operator(device: str, name: str) -> None:
    """One graph, and one operator, with the results, gradients and buffers of eager calls."""
    module, x = example(name, device)
    given, same = (values_of(module, 1, learned=True) for _ in range(2))
    with unchanged(module):
        result = capture(calling(module), given, x, backend="inductor")
        backward(result.out)
    assert (len(result.graphs), result.breaks, result.kinds) == (1, 0, ["operator"])
    assert_as_eager(module, result.out, given, same, x)


@with_inductor
@pytest.mark.parametrize("name", ["MLP", "Normed", "Attention", "Tied"])
def test_the_compiled_callable(device: str, name: str) -> None:
    module, x = example(name, device)
    fn = fcall.compile(module)
    for seed in range(3):
        given, same = (values_of(module, seed, learned=True) for _ in range(2))
        with unchanged(module):
            out = fn(given, x)
            backward(out)
        assert_as_eager(module, out, given, same, x)


def assert_as_eager(module: nn.Module, out: Tensor, given: Values, same: Values, x: Tensor) -> None:
    """Compare with an eager call: ``out``, and what the call and its backward left in ``given``."""
    expected = fcall.functional_call(module, same, x)
    backward(expected)
    assert {out.device, *(v.device for v in given.values())} == {x.device}
    found = out, given, gradients(given)
    for one, other in zip(
        pytree.tree_leaves(found), pytree.tree_leaves((expected, same, gradients(same)))
    ):
        # Of a bias before a batch norm the gradient is nothing but what is lost by rounding.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@with_inductor
def test_transforms(device: str) -> None:
    """A step of an ensemble, and gradients of each sample, in one graph each."""
    module, x = example("MLP", device)

    def loss(p: Values, x: Tensor) -> Tensor:
        return fcall.functional_call(module, p, (x,)).square().mean()

    def step(p: Values, x: Tensor) -> Values:
        return {
            n: v - 0.1 * g for (n, v), g in zip(p.items(), torch.func.grad(loss)(p, x).values())
        }

    members = [values_of(module, seed) for seed in range(3)]
    stacked = {n: torch.stack([member[n] for member in members]) for n in members[0]}
    for fn, args in (
        (torch.func.vmap(step, in_dims=(0, None)), (stacked, x)),
        (torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0)), (members[0], x)),
    ):
        expected = fn(*args)
        on(device, expected)
        assert_close(inductor(fn)(*args), expected)
    assert_close(
        torch.func.vmap(step, in_dims=(0, None))(stacked, x),
        {n: torch.stack([step(member, x)[n] for member in members]) for n in stacked},
    )


def test_a_traced_graph_goes_to_the_device(device: str) -> None:
    module, x = EXAMPLES["Attention"]()
    program = fcall.trace(module, state_of(module), x).to(device)
    p = {name: value.to(device) for name, value in state_of(module, seed=1).items()}
    out = program(p, x.to(device))
    on(device, out)
    assert_close(out.cpu(), loaded(module, p)(in_float64(x)), dtype=torch.float32)


# --- Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MLP", "Normed", "Attention"])
def test_autocast(device: str, name: str, dtype: torch.dtype) -> None:
    """The casts are those of torch.func's call, and no cast weight of a call is used in the next.

    Autocast keeps what it cast of leaves that need a gradient, until its block ends.
    """
    module, x = example(name, device)
    results = {}
    for kind, call in CALLS.items():
        first, second = (values_of(module, seed, learned=True) for seed in (1, 2))
        with torch.autocast(device, dtype):
            outs = [call(module, p, (x,)) for p in (first, second, first)]
        backward(outs)
        results[kind] = (outs, gradients(first), gradients(second))
    assert_close(results["fcall"], results["torch.func"])
    outs = results["fcall"][0]
    assert outs[0].dtype == (torch.float32 if name == "Attention" else dtype)  # its last sum
    assert not outs[0].equal(outs[1])
    with torch.autocast(device, dtype):
        assert_close(fcall.functional_call(module, values_of(module, 2), (x,)), outs[1].detach())


@with_inductor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_compiled(device: str, dtype: torch.dtype) -> None:
    """What was compiled outside of autocast is not used inside, and the other way round."""
    module, x = example("MLP", device)
    for fn in (fcall.compile(module), inductor(calling(module))):
        for cast in (False, True, False, True):
            p = values_of(module, 1, learned=True)
            same = fresh(p)
            with torch.autocast(device, dtype, enabled=cast):
                out, expected = fn(p, x), fcall.functional_call(module, same, x)
            assert out.dtype == expected.dtype == (dtype if cast else torch.float32)
            backward((out, expected))
            tolerance = torch.bfloat16 if cast else torch.float32  # Inductor rounds less often
            assert_close(out, expected, dtype=tolerance)
            assert_close(gradients(p), gradients(same), dtype=tolerance)


@with_inductor
def test_tf32_flags(device: str) -> None:
    """A flag that is set between two calls counts: what is left to a library heeds it."""
    torch.manual_seed(0)
    module, x = nn.Linear(256, 256).to(device), torch.randn(64, 256, device=device)
    p = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    calls = {
        "eager": calling(module),
        "compiled": inductor(calling(module)),
        "compiled callable": fcall.compile(module),
    }
    errors: dict[str, list[float]] = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            plain = nn.functional.linear(x, p["weight"], p["bias"])
            exact = nn.functional.linear(x.double(), p["weight"].double(), p["bias"].double())
            for name, call in calls.items():
                out = call(p, x)
                error = ((out - exact).abs().max() / exact.abs().max()).item()
                errors.setdefault(name, []).append(error)
                if name == "eager":
                    assert out.equal(plain)
    finally:
        torch.set_float32_matmul_precision(before)
    has_tf32 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    for found in errors.values():
        assert found[0] < 1e-5 > found[2]
        assert (found[1] > 1e-5) if has_tf32 else (found[1] < 1e-2)


# --- State, randomness, failures ----------------------------------------------------------------


@with_inductor
@pytest.mark.parametrize("kind", ["eager", "compiled", "compiled callable"])
def test_buffers_are_written_in_place(device: str, kind: str) -> None:
    module, x = example("Normed", device)
    call = {
        "eager": calling(module),
        "compiled": inductor(calling(module)),
        "compiled callable": fcall.compile(module),
    }
    p = values_of(module, 1)
    twin = loaded(module, p)
    buffers = {name: p[name] for name, _ in module.named_buffers()}
    with unchanged(module):
        for _ in range(3):
            assert_close(call[kind](p, x), twin(in_float64(x)), dtype=torch.float32)
    for name, buffer in buffers.items():
        assert p[name] is buffer, "written in place, or another tensor took its place"
    assert_close(buffers, dict(twin.named_buffers()), dtype=torch.float32)
    assert buffers["norm.num_batches_tracked"].item() == 3
    on(device, buffers)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(device: str, randomness: str) -> None:
    module = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)).to(device)
    x = torch.rand(5, 3, device=device)
    stacked = {n: torch.stack([v, v]) for n, v in values_of(module, 1).items()}

    def masks(call: Callable[..., Any]) -> Tensor:
        torch.manual_seed(7)
        out = torch.func.vmap(
            lambda p, x: call(module, p, (x,)), in_dims=(0, None), randomness=randomness
        )(stacked, x)
        return out == 0

    ours = masks(fcall.functional_call)
    assert ours.equal(masks(torch.func.functional_call))
    assert 0.3 < ours.double().mean() < 0.7
    assert ours[0].equal(ours[1]) is (randomness == "same")


def test_dropout_under_vmap_that_allows_none(device: str) -> None:
    module = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)).to(device)
    stacked = {n: torch.stack([v, v]) for n, v in values_of(module, 1).items()}
    x = torch.rand(5, 3, device=device)
    with unchanged(module), pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda p: fcall.functional_call(module, p, (x,)))(stacked)


class Hungry(nn.Module):
    """Needs more memory than there is, halfway through, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 2)
        self.hungry = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.hungry:
            x = x + torch.empty(2**50, device=x.device)[:2]
        return self.second(x)


@pytest.mark.parametrize("kind", ["eager", "beside another thread", "grad", "vmap"])
def test_out_of_memory_in_a_call(device: str, kind: str) -> None:
    """The module is as it was, and the next call is right."""
    module, x = Hungry().to(device), torch.rand(5, 3, device=device)
    p = values_of(module, 1)

    def call() -> Any:
        if kind == "vmap":
            return torch.func.vmap(lambda x: fcall.functional_call(module, p, x))(x)
        if kind == "grad":
            return torch.func.grad(lambda p: fcall.functional_call(module, p, x).sum())(p)
        return fcall.functional_call(module, p, x)

    expected = call()
    error = torch.cuda.OutOfMemoryError if device == "cuda" else RuntimeError
    with alive() if "thread" in kind else contextlib.nullcontext():
        module.hungry = True
        with unchanged(module), pytest.raises(error, match="memory"):
            call()
        module.hungry = False
        assert_close(call(), expected)


def test_threads(device: str) -> None:
    """Calls of one module from many threads, each with values of its own."""
    size = 4
    module, x = example("Attention", device)
    values = [values_of(module, seed) for seed in range(size)]
    expected = [fcall.functional_call(module, p, x) for p in values]

    def many(i: int) -> list[Tensor]:
        return [fcall.functional_call(module, values[i], x) for _ in range(20)]

    with unchanged(module):
        found = run(*[lambda i=i: many(i) for i in range(size)])
    for outs, wanted in zip(found, expected):
        assert_close(outs, [wanted] * 20)
