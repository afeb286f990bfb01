"""Code written for torch.func, run on fcall: where it reaches, and that it is undone exactly."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import functional_call as home
from torch.func import functional_call as imported
from torch.nn.utils import stateless
from torch.nn.utils.stateless import _functional_call as private_imported
from torch.nn.utils.stateless import functional_call as stateless_imported

import fcall
from compile_tests.support.compiled import check_compiled
from compile_tests.support.models import MLP, Counter, Normed, Shared
from compile_tests.support.oracle import assert_close, state_of, unchanged
from fcall import errors
from fcall.patch import patch_torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:`stateless.functional_call` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.stateless:FutureWarning"),
]

PLACES = [
    (torch.func, "functional_call"),
    (home, "functional_call"),
    (stateless, "functional_call"),
    (stateless, "_functional_call"),
]
BEFORE = [getattr(module, name) for module, name in PLACES]

CALLS: dict[str, Callable[..., Any]] = {
    "torch.func": lambda *a, **k: torch.func.functional_call(*a, **k),
    "its home": lambda *a, **k: home.functional_call(*a, **k),
    "stateless": lambda *a, **k: torch.nn.utils.stateless.functional_call(*a, **k),
    "stateless, private": lambda *a, **k: torch.nn.utils.stateless._functional_call(*a, **k),
    "imported before": lambda *a, **k: imported(*a, **k),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def now() -> list[Any]:
    return [getattr(module, name) for module, name in PLACES]


def is_patched() -> bool:
    return torch.func.functional_call is fcall.functional_call


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    """Each test ends as it began, with the very same functions."""
    yield
    assert all(a is b for a, b in zip(now(), BEFORE))


# --- What it reaches ----------------------------------------------------------------------------


@each_call
def test_a_call(call: Callable[..., Any]) -> None:
    module, x = Normed(), torch.rand(4, 2, 6, 6)
    values, others = state_of(module, seed=0), state_of(module, seed=0)
    expected = call(module, values, x)
    with fcall.record_routes() as routes, unchanged(module):
        call(module, values, x)
        assert routes == []
        with patch_torch():
            out = call(module, others, (x,))
    assert [(route.module, route.kind) for route in routes] == [("Normed", "eager")]
    assert_close(out, expected)


@each_call
def test_options(call: Callable[..., Any]) -> None:
    module, x = MLP(), torch.rand(5, 3)
    with patch_torch():
        out = call(module, state_of(module), (x,), {"scale": 2.0}, tie_weights=False, strict=True)
        with pytest.raises(errors.StrictKeysError):
            call(module, {}, x, strict=True)
    assert_close(out, module(x, scale=2.0))


@each_call
def test_write_back(call: Callable[..., Any]) -> None:
    values = {"foo": torch.zeros(())}
    with patch_torch():
        call(Counter(), values, torch.ones(()))
    assert values["foo"] == 1


def test_keyword_names() -> None:
    module, x = MLP(), torch.rand(5, 3)
    values = state_of(module)
    with patch_torch():
        out = torch.func.functional_call(module=module, parameter_and_buffer_dicts=values, args=x)
        for call in (stateless.functional_call, stateless._functional_call):
            assert_close(call(module=module, parameters_and_buffers=values, args=x), out)


def test_what_was_imported_before_runs_on_fcall() -> None:
    """Only what has the innermost private function by name keeps torch's."""
    module, x = nn.Linear(3, 2), torch.rand(5, 3)
    with patch_torch():
        for call, count in ((imported, 1), (stateless_imported, 1), (private_imported, 0)):
            with fcall.record_routes() as routes:
                call(module, state_of(module), x)
            assert len(routes) == count, call


def test_torch_is_right_where_it_was_not() -> None:
    """A submodule with two names, both given: torch never gives it back."""
    module, x = Shared(), torch.rand(2, 3)
    first = state_of(module)
    values = {**first, **{f"second{name.removeprefix('first')}": v for name, v in first.items()}}
    with patch_torch(), unchanged(module):
        torch.func.functional_call(module, values, x)


def test_the_old_name_warns() -> None:
    model = nn.Linear(3, 2)
    with patch_torch():
        with pytest.warns(FutureWarning, match=r"use `fcall\.functional_call`"):
            stateless.functional_call(model, {}, torch.ones(1, 3))
        stateless._functional_call(model, {}, torch.ones(1, 3))


def test_transforms() -> None:
    module, x = MLP(), torch.rand(5, 3)
    values = state_of(module, seed=0)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, x).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected = per_sample(values, x)
    with patch_torch(), fcall.record_routes() as routes:
        assert_close(per_sample(values, x), expected)
    assert len(routes) == 1


# --- Undone -------------------------------------------------------------------------------------


def test_nothing_happens_before_it_is_entered() -> None:
    patch_torch()
    assert not is_patched()


def test_for_good() -> None:
    patch = patch_torch()
    patch.start()
    assert is_patched()
    patch.stop()
    assert not is_patched()


def test_stop_without_start() -> None:
    patch = patch_torch()
    with pytest.raises(errors.PatchNotStartedError, match="not started"):
        patch.stop()
    with patch_torch():  # of another one
        with pytest.raises(RuntimeError):
            patch.stop()
        assert is_patched()


def test_nesting() -> None:
    same = patch_torch()
    with same:
        with same, patch_torch():
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_in_any_order() -> None:
    first, second = patch_torch(), patch_torch()
    first.start()
    second.start()
    first.stop()
    assert is_patched()
    second.stop()


def test_what_was_there_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched_by_another:
        patched_by_another.setattr(torch.func, "functional_call", len)
        with patch_torch():
            assert is_patched()
        assert torch.func.functional_call is len


def test_after_an_exception() -> None:
    module = MLP()
    with pytest.raises(KeyboardInterrupt), patch_torch():  # noqa: PT012
        assert is_patched()
        module.register_forward_hook(_interrupt)
        torch.func.functional_call(module, {}, torch.rand(5, 3))
    assert not is_patched()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_it_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def places() -> Iterator[Any]:
        yield "torch.func", torch.func, "functional_call"
        raise KeyboardInterrupt

    patch = patch_torch()
    with monkeypatch.context() as context:
        context.setattr(fcall._torch, "functional_calls", places)
        with pytest.raises(KeyboardInterrupt):
            patch.start()
    assert not is_patched()
    with patch:
        assert is_patched()


def test_the_decorator() -> None:
    @patch_torch()
    def f(depth: int, *, fail: bool = False) -> int:
        """What f does."""
        assert is_patched()
        if fail:
            raise ValueError("f")
        return f(depth - 1) if depth else 7

    assert not is_patched()
    assert (f.__name__, f.__doc__) == ("f", "What f does.")
    assert f(3) == 7
    with pytest.raises(ValueError, match="f"):
        f(0, fail=True)


def test_the_decorator_on_a_generator_function() -> None:
    @patch_torch()
    def f() -> Iterator[bool]:
        yield is_patched()
        yield is_patched()

    assert list(f()) == [True, True]
    abandoned = f()
    assert next(abandoned)
    abandoned.close()


def test_the_decorator_on_a_coroutine_function() -> None:
    @patch_torch()
    async def f() -> bool:
        await asyncio.sleep(0)
        return is_patched()

    assert asyncio.run(f())


def test_threads() -> None:
    module, x = nn.Linear(3, 2), torch.rand(5, 3)
    expected = module(x)

    def run(index: int) -> None:
        for _ in range(100):
            try:
                with patch_torch():
                    assert is_patched()
                    assert torch.equal(torch.func.functional_call(module, {}, x), expected)
                    if index % 2:
                        raise LookupError
            except LookupError:
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_the_last_thread_out_restores() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with patch_torch():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with patch_torch():
        assert is_patched()
    assert is_patched()
    leave.set()
    thread.join()


# --- Compiled -----------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("name", CALLS)
def test_compiled(name: str) -> None:
    call, module = CALLS[name], Normed()

    def f(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return call(module, values, (x,))

    with patch_torch():
        check_compiled(f, state_of(module, seed=0), torch.rand(4, 2, 6, 6), module=module)


@pytest.mark.compiled
def test_what_is_compiled_follows_the_patch() -> None:
    module, x = MLP(), torch.rand(5, 3)

    def f(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (x,))

    torch.compiler.reset()
    compiled, values = torch.compile(f, fullgraph=True, backend="aot_eager"), state_of(module)
    with fcall.record_routes() as routes:
        before = compiled(values, x)
        assert routes == []
        with patch_torch():
            assert_close(compiled(values, x), before)
            assert [route.kind for route in routes] == ["operator"]
        assert_close(compiled(values, x), before)
    assert len(routes) == 1


@pytest.mark.compiled
def test_the_decorator_round_a_compiled_function() -> None:
    module, x = MLP(), torch.rand(5, 3)
    torch.compiler.reset()

    @patch_torch()
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (x,))

    with fcall.record_routes() as routes:
        assert_close(f(state_of(module), x), module(x))
    assert [route.kind for route in routes] == ["operator"]


@pytest.mark.compiled
def test_export_of_a_module() -> None:
    """They give what they give without the patch: an exported module has no operator in it."""
    module, x = MLP(), torch.rand(5, 3)
    with patch_torch():
        for strict in (False, True):
            program = torch.export.export(module, (x,), strict=strict)
            assert_close(program.module()(x), module(x))
    graph = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.linear.default in graph


FIRST_IN_A_PATCH = """
import torch, fcall
from fcall.patch import patch_torch

module, x = torch.nn.Linear(3, 2), torch.rand(5, 3)
torchs = torch.func.functional_call
with patch_torch(), fcall.record_routes() as inside:
    f = lambda p, x: torch.func.functional_call(module, p, (x,))
    torch.compile(f, fullgraph=True, backend="eager")(dict(module.named_parameters()), x)
torch.compiler.reset()
with fcall.record_routes() as outside:
    for call in (torch.func.functional_call, fcall.functional_call):
        f = lambda p, x: call(module, p, (x,))
        out = torch.compile(f, fullgraph=True, backend="eager")(dict(module.named_parameters()), x)
        torch.testing.assert_close(out, module(x))
assert torch.func.functional_call is torchs
print([route.kind for route in inside], [route.kind for route in outside])
"""


@pytest.mark.compiled
def test_dynamo_imported_in_a_patch() -> None:
    """Dynamo has a table of torch's functions, made at its first use: here with fcall's in it."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST_IN_A_PATCH], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "['operator'] ['operator']"
