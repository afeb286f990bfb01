"""Calls and blocks whose code is suspended: in generators, coroutines, and tasks on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.oracle import unchanged
from compile_tests.support.parity import both
from compile_tests.test_reentrance import Scale, scalar


class Yields(Scale):
    """Its forward is a generator function."""

    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        yield x * self.weight
        yield x * self.weight


class Awaits(Scale):
    """Its forward is a coroutine function."""

    async def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        await asyncio.sleep(0)
        return x * self.weight


# --- one call -----------------------------------------------------------------------------------


@both
def test_a_generator_runs_after_the_call(call: Any) -> None:
    """The call returns it before its first line has run: it finds the module's own values."""
    module = Yields()
    with unchanged(module):
        assert list(call(module, scalar(3.0), (torch.ones(()),))) == [2, 2]


def test_a_generator_that_runs_in_a_block() -> None:
    module = Yields()
    with unchanged(module):
        with fcall.substitute(module, scalar(3.0)):
            generator = module(torch.ones(()))
            assert next(generator) == 3
        assert next(generator) == 2


@both
def test_a_coroutine_runs_after_the_call(call: Any) -> None:
    module = Awaits()
    with unchanged(module):
        assert asyncio.run(call(module, scalar(3.0), (torch.ones(()),))) == 2


@both
def test_a_call_in_a_generator_that_is_suspended_between_calls(call: Any) -> None:
    module = Scale()

    def steps(value: float) -> Iterator[Tensor]:
        for i in range(3):
            yield call(module, scalar(value + i), (torch.ones(()),))

    with unchanged(module):
        assert list(zip(steps(10.0), steps(20.0))) == [(10, 20), (11, 21), (12, 22)]


# --- blocks in generators -----------------------------------------------------------------------


def block(module: nn.Module, value: float) -> Generator[float, None, None]:
    """Yield what a call in a block gives, again and again."""
    with fcall.substitute(module, scalar(value)):
        while True:
            yield module(torch.ones(())).item()


def test_a_block_that_is_suspended_and_closed() -> None:
    module = Scale()
    with unchanged(module):
        generator = block(module, 3.0)
        assert next(generator) == 3
        generator.close()
        assert module(torch.ones(())) == 2


def test_a_block_in_a_generator_that_is_dropped() -> None:
    module = Scale()
    with unchanged(module):
        generator = block(module, 3.0)
        next(generator)
        del generator


def test_blocks_left_in_order() -> None:
    module = Scale()
    with unchanged(module):
        first, second = block(module, 3.0), block(module, 4.0)
        assert (next(first), next(second)) == (3, 4)
        second.close()
        assert next(first) == 3
        first.close()


def test_blocks_left_out_of_order() -> None:
    """Each sees its own values or says that it cannot; the module is unchanged in the end."""
    module = Scale()
    with unchanged(module):
        first, second = block(module, 3.0), block(module, 4.0)
        with contextlib.suppress(fcall.errors.FcallError):
            assert (next(first), next(second)) == (3, 4)
        with contextlib.suppress(fcall.errors.FcallError):
            first.close()
        with contextlib.suppress(fcall.errors.FcallError, StopIteration):
            assert next(second) == 4
        with contextlib.suppress(fcall.errors.FcallError):
            second.close()


def test_a_block_ended_within_another() -> None:
    module = Scale()
    with unchanged(module):
        generator = block(module, 3.0)
        next(generator)
        with contextlib.suppress(fcall.errors.FcallError), fcall.substitute(module, scalar(4.0)):
            with contextlib.suppress(fcall.errors.FcallError):
                generator.close()
            assert module(torch.ones(())) == 4


def test_a_block_begun_in_a_call() -> None:
    """It outlives the call, which must not take its end for the module's own state."""
    generators: list[Any] = []

    class Begins(Scale):
        def forward(self, x: Tensor) -> Tensor:
            before = x * self.weight
            if not generators:
                generators.append(block(self, 4.0))
                next(generators[0])
            return before

    module = Begins()
    with unchanged(module):
        with contextlib.suppress(fcall.errors.FcallError):
            assert fcall.functional_call(module, scalar(3.0), torch.ones(())) == 3
        with contextlib.suppress(fcall.errors.FcallError):
            generators[0].close()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_three_blocks_in_any_order(order: tuple[int, ...]) -> None:
    """Generators that take turns are one task: the block entered last is in force for all."""
    module = Scale()
    with unchanged(module):
        blocks = {value: block(module, value) for value in (3.0, 4.0, 5.0)}
        assert [next(b) for b in blocks.values()] == [3, 4, 5]
        for i in order:
            blocks.pop(3.0 + i).close()
            assert module(torch.ones(())) == max(blocks, default=module.weight.item())


# --- tasks --------------------------------------------------------------------------------------

# A block belongs to the task that entered it, as the value of a ContextVar does: in the others
# the module has its own values, and a task that is begun within the block has the block's.


async def _in_a_block(module: nn.Module, value: float, steps: int) -> list[float]:
    seen = []
    with fcall.substitute(module, scalar(value)):
        for _ in range(steps):
            await asyncio.sleep(0)
            seen.append(module(torch.ones(())).item())
    return seen


@both
def test_tasks_with_calls(call: Any) -> None:
    """A call is never suspended: nothing can mix."""
    module = Scale()

    async def calls(value: float) -> list[float]:
        out = []
        for _ in range(3):
            await asyncio.sleep(0)
            out.append(call(module, scalar(value), (torch.ones(()),)).item())
        return out

    async def main() -> list[list[float]]:
        return await asyncio.gather(*[calls(value) for value in (3.0, 4.0, 5.0)])

    with unchanged(module):
        assert asyncio.run(main()) == [[3.0] * 3, [4.0] * 3, [5.0] * 3]


def test_tasks_with_blocks() -> None:
    """Each task sees its own block's values or is told that it cannot; none sees another's."""
    module = Scale()

    async def main() -> list[Any]:
        tasks = [_in_a_block(module, value, steps) for value, steps in ((3.0, 2), (4.0, 5))]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with unchanged(module):
        results = asyncio.run(main())
        for value, result in zip((3.0, 4.0), results):
            assert isinstance(result, fcall.errors.FcallError) or set(result) == {value}


def test_a_task_without_a_block_beside_one_with() -> None:
    module = Scale()

    async def plain() -> list[float]:
        seen = []
        for _ in range(3):
            await asyncio.sleep(0)
            seen.append(module(torch.ones(())).item())
        return seen

    async def main() -> list[list[float]]:
        return await asyncio.gather(_in_a_block(module, 3.0, 3), plain())

    with unchanged(module):
        assert asyncio.run(main()) == [[3.0] * 3, [2.0] * 3]


def test_a_task_begun_in_a_block_has_its_values() -> None:
    module = Scale()

    async def child() -> float:
        return module(torch.ones(())).item()

    async def main() -> float:
        with fcall.substitute(module, scalar(3.0)):
            return await asyncio.create_task(child())

    with unchanged(module):
        assert asyncio.run(main()) == 3


def test_a_task_that_is_cancelled_in_a_block() -> None:
    module = Scale()

    async def main() -> None:
        task = asyncio.create_task(_in_a_block(module, 3.0, 1000))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert module(torch.ones(())) == 2

    with unchanged(module):
        asyncio.run(main())


def test_an_asynchronous_generator_with_a_block() -> None:
    module = Scale()

    async def steps() -> AsyncIterator[float]:
        with fcall.substitute(module, scalar(3.0)):
            for _ in range(2):
                await asyncio.sleep(0)
                yield module(torch.ones(())).item()

    async def main() -> list[float]:
        return [value async for value in steps()]

    with unchanged(module):
        assert asyncio.run(main()) == [3, 3]


def test_a_block_in_a_copied_context() -> None:
    module = Scale()

    def run() -> float:
        with fcall.substitute(module, scalar(3.0)):
            return module(torch.ones(())).item()

    with unchanged(module):
        assert contextvars.copy_context().run(run) == 3
        assert module(torch.ones(())) == 2
