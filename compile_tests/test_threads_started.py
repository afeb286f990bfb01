"""Threads that a module's own forward starts: they see the values given to the call, as in torch.

And tasks of asyncio in several threads. Each test runs where the call has the process to itself,
and where another thread lives: see fcall/eager/swap.py.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.checkpoints import Checkpointed, Times, leaf, slope
from compile_tests.support.oracle import assert_close, unchanged
from compile_tests.support.parity import both
from compile_tests.support.threads import SECONDS, alive, alone, run
from compile_tests.test_reentrance import Scale, scalar

ONE = torch.ones(())


@pytest.fixture(params=["one thread", "two threads"], autouse=True)
def others(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test alone, and with another thread that does nothing."""
    with alive() if request.param == "two threads" else alone():
        yield


class Starts(Scale):
    """Has ``way`` run a look at its weight, and returns what was seen, and its own product."""

    def __init__(self, way: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(lambda: self.weight.item()), (x * self.weight).item()


# --- ways ---------------------------------------------------------------------------------------


def _in_a_thread(look: Callable[[], Any]) -> Any:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(look()))
    thread.start()
    thread.join(SECONDS)
    return seen[0]


class Subclass(threading.Thread):
    """With a ``run`` of its own."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__()
        self.look = look

    def run(self) -> None:
        self.seen = self.look()


def _in_a_subclass(look: Callable[[], Any]) -> Any:
    thread = Subclass(look)
    thread.start()
    thread.join(SECONDS)
    return thread.seen


def _in_a_timer(look: Callable[[], Any]) -> Any:
    seen: list[Any] = []
    timer = threading.Timer(0, lambda: seen.append(look()))
    timer.start()
    timer.join(SECONDS)
    return seen[0]


def _in_a_thread_of_a_thread(look: Callable[[], Any]) -> Any:
    return _in_a_thread(lambda: _in_a_thread(look))


def _in_a_pool(look: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(look).result(SECONDS)


def _in_a_pool_by_map(look: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        (seen,) = {*pool.map(lambda _: look(), range(4))}
    return seen


def _in_a_task(look: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.create_task(asyncio.to_thread(look))

    return asyncio.run(main())


def _in_an_executor_of_a_loop(look: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, look)

    return asyncio.run(main())


WAYS = {
    "thread": _in_a_thread,
    "subclass": _in_a_subclass,
    "timer": _in_a_timer,
    "thread of a thread": _in_a_thread_of_a_thread,
    "pool": _in_a_pool,
    "map": _in_a_pool_by_map,
    "to_thread": _in_a_task,
    "run_in_executor": _in_an_executor_of_a_loop,
}

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# --- what they see ------------------------------------------------------------------------------


@both
@ways
def test_what_forward_starts(call: Any, way: Any) -> None:
    module = Starts(way)
    with unchanged(module):
        assert call(module, scalar(3.0), (ONE,)) == (3, 3)
        assert module(ONE) == (2, 2)


@ways
def test_what_a_block_starts(way: Any) -> None:
    module = Starts(way)
    with unchanged(module):
        with fcall.substitute(module, scalar(3.0)):
            assert module(ONE) == (3, 3)
            assert way(lambda: module.weight.item()) == 3
        assert way(lambda: module.weight.item()) == 2


@both
def test_a_pool_that_was_there_before(call: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: 1).result(SECONDS) == 1  # its thread lives
        module = Starts(lambda look: pool.submit(look).result(SECONDS))
        with unchanged(module):
            assert call(module, scalar(3.0), (ONE,)) == (3, 3)
            assert pool.submit(lambda: module.weight.item()).result(SECONDS) == 2


@both
@ways
def test_a_call_in_what_forward_starts(call: Any, way: Any) -> None:
    """Another call of the same module, with values of its own."""
    module = Starts(lambda _: way(lambda: call(module, scalar(5.0), (ONE,))))
    inner = Starts(lambda look: look())
    module.weight = inner.weight
    object.__setattr__(module, "inner", inner)
    module.way = lambda _: way(lambda: (call(inner, scalar(5.0), (ONE,)), inner.weight.item()))
    with unchanged(module), unchanged(inner):
        assert call(module, scalar(3.0), (ONE,)) == (((5, 5), 2), 3)


@ways
def test_a_call_of_itself_in_what_forward_starts(way: Any) -> None:
    module = Starts(lambda look: look())

    def nested(look: Callable[[], Any]) -> Any:
        module.way = lambda look: look()
        return way(lambda: (fcall.functional_call(module, scalar(5.0), (ONE,)), look())), look()

    module.way = nested
    with unchanged(module):
        out = fcall.functional_call(module, scalar(3.0), (ONE,))
    assert out == ((((5, 5), 3), 3), 3)


@both
def test_a_thread_that_outlives_the_call(call: Any) -> None:
    """It sees the call's values until the call ends, and then the module's own."""
    on, seen = threading.Event(), []

    def start(look: Callable[[], Any]) -> None:
        first = threading.Event()

        def late() -> None:
            seen.append(look())
            first.set()
            assert on.wait(SECONDS)
            seen.append(look())

        threads.append(threading.Thread(target=late))
        threads[-1].start()
        assert first.wait(SECONDS)

    threads: list[threading.Thread] = []
    module = Starts(start)
    with unchanged(module):
        call(module, scalar(3.0), (ONE,))
        on.set()
        threads[0].join(SECONDS)
        assert seen == [3, 2]


def test_a_thread_made_before_and_started_in_the_call() -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(module.weight.item()))

    def start(_: Any) -> None:
        thread.start()
        thread.join(SECONDS)

    module = Starts(start)
    fcall.functional_call(module, scalar(3.0), (ONE,))
    assert seen == [3]


def test_a_thread_reassigns_what_was_given() -> None:
    """The call's dict gets it, as if forward itself had done it."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self) -> None:
            def count() -> None:
                self.calls = self.calls + 1

            _in_a_thread(count)
            _in_a_pool(count)

    module, given = Counts(), {"calls": torch.tensor(5.0)}
    with unchanged(module):
        fcall.functional_call(module, given)
    assert given["calls"] == 7


def test_an_exception_in_a_thread() -> None:
    def fails(look: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: 1 / 0).result(SECONDS)

    module = Starts(fails)
    with unchanged(module), pytest.raises(ZeroDivisionError):
        fcall.functional_call(module, scalar(3.0), (ONE,))
    assert type(module._parameters) is dict


# --- when the call has ended, and for others ----------------------------------------------------


def _is_kept(start: Callable[[Callable[[], Any]], Any]) -> bool:
    """Whether a call's value lives on after it, without the help of the garbage collector."""
    given = scalar(3.0)
    value = weakref.ref(given["weight"])
    gc.disable()
    try:
        fcall.functional_call(Starts(start), given, (ONE,))
        del given
        return value() is not None
    finally:
        gc.enable()


def test_a_call_keeps_no_values() -> None:
    assert not _is_kept(lambda look: look())


def test_a_thread_object_keeps_no_values() -> None:
    threads: list[threading.Thread] = []

    def start(look: Callable[[], Any]) -> None:
        threads.append(threading.Thread(target=look))
        threads[-1].start()
        threads[-1].join(SECONDS)

    assert not _is_kept(start)


def test_a_pool_begun_in_a_call_keeps_no_values() -> None:
    """Its thread, which lives on, was started by the first thing submitted."""
    with ThreadPoolExecutor(1) as pool:
        assert not _is_kept(lambda look: pool.submit(look).result(SECONDS))


def test_a_pool_begun_in_a_call_serves_others() -> None:
    """What a thread without a call submits sees the module's own, also during the call."""
    reached, on = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def begin(look: Callable[[], Any]) -> Any:
            pool.submit(look).result(SECONDS)
            reached.set()
            return on.wait(SECONDS)

        def plain() -> Any:
            assert reached.wait(SECONDS)
            try:
                return pool.submit(lambda: module.weight.item()).result(SECONDS)
            finally:
                on.set()

        module = Starts(begin)
        _, seen = run(lambda: fcall.functional_call(module, scalar(3.0), (ONE,)), plain)
    assert seen == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_what_forward_starts(reentrant: bool) -> None:
    """It computes another call's forward again; this call's values stay where they are."""
    reached, on = threading.Event(), threading.Event()
    again = False

    class Recomputed(Times):
        def forward(self, x: Tensor) -> Tensor:
            if again:
                reached.set()
                assert on.wait(SECONDS)
            return super().forward(x)

    class Backward(Starts):
        def forward(self, x: Tensor) -> Any:
            nonlocal again
            again = True
            thread = threading.Thread(target=out.backward)
            thread.start()
            assert reached.wait(SECONDS)
            seen = self.weight.item()
            on.set()
            thread.join(SECONDS)
            return seen, (x * self.weight).item()

    weight = leaf(0.7)
    checkpointed = Checkpointed(Recomputed(), reentrant)
    out = fcall.functional_call(checkpointed, {"inner.weight": weight}, (leaf(0.3),))
    module = Backward(lambda look: look())
    with unchanged(module), unchanged(checkpointed):
        assert fcall.functional_call(module, scalar(3.0), (ONE,)) == (3, 3)
    assert_close(weight.grad, slope(0.7, 0.3))


# --- asyncio, in several threads ----------------------------------------------------------------


def test_loops_of_tasks_in_threads() -> None:
    """Tasks with blocks of their own, tasks with calls, and tasks with neither."""
    module = Scale()

    async def block(value: float) -> None:
        for _ in range(10):
            with fcall.substitute(module, scalar(value)):
                assert module(ONE) == value
                await asyncio.sleep(0)
                assert module.weight == value
                assert await asyncio.to_thread(module, ONE) == value
                assert module(ONE) == value
            assert module.weight == 2
            await asyncio.sleep(0)

    async def call(value: float) -> None:
        for _ in range(10):
            assert fcall.functional_call(module, scalar(value), (ONE,)) == value
            await asyncio.sleep(0)

    async def neither() -> None:
        for _ in range(20):
            assert module(ONE) == 2
            await asyncio.sleep(0)

    async def main(first: float) -> None:
        tasks = [work(first + i) for work in (block, call) for i in range(3)]
        await asyncio.gather(neither(), *tasks)

    with unchanged(module):
        run(*[lambda first=first: asyncio.run(main(first)) for first in (10.0, 20.0, 30.0)])  # type: ignore[misc]
    assert type(module._parameters) is dict
