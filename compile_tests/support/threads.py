"""Functions in threads, all at once: with their exceptions, and an end to what does not end."""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from typing import Any
from unittest import mock

import pytest
from torch import Tensor, nn

import fcall

SECONDS = 60.0
"""After which a thread is taken to be stuck."""


class Running:
    """Functions, each in a thread, begun at the same time, which no call has started."""

    def __init__(self, functions: Sequence[Callable[[], Any]]) -> None:
        self.results: list[Any] = [None] * len(functions)
        self.errors: list[BaseException] = []
        self._begin = threading.Barrier(len(functions))
        self.threads = [
            # Daemons, so that a stuck one does not keep the process.
            threading.Thread(target=self._run, args=(i, function), daemon=True)
            for i, function in enumerate(functions)
        ]
        for thread in self.threads:
            Context().run(thread.start)  # or it would have the values of a block that this is in

    def _run(self, number: int, function: Callable[[], Any]) -> None:
        try:
            self._begin.wait(SECONDS)
            self.results[number] = function()
        except BaseException as error:  # noqa: BLE001, raised again by join
            self.errors.append(error)

    def join(self, seconds: float = SECONDS) -> list[Any]:
        """Return what the functions returned, or raise what the first of them raised."""
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            pytest.fail(f"threads still run after {seconds} s")
        if self.errors:
            raise self.errors[0]
        return self.results


def run(*functions: Callable[[], Any], seconds: float = SECONDS) -> list[Any]:
    """Run each function in a thread of its own, and return what they returned."""
    return Running(functions).join(seconds)


def run_beside(loops: Sequence[Callable[[], Any]], *functions: Callable[[], Any]) -> list[Any]:
    """Run each function in a thread, and meanwhile each of ``loops``, again and again, in one."""
    done = threading.Event()

    def again_and_again(loop: Callable[[], Any]) -> None:
        loop()
        while not done.is_set():
            loop()

    def counted(function: Callable[[], Any]) -> Any:
        try:
            return function()
        finally:
            left.pop()
            if not left:
                done.set()

    left = [*functions]
    beside = [lambda loop=loop: again_and_again(loop) for loop in loops]  # type: ignore[misc]
    own = [lambda function=function: counted(function) for function in functions]  # type: ignore[misc]
    return run(*own, *beside)[: len(own)]


@contextlib.contextmanager
def switching(seconds: float = 1e-6) -> Iterator[None]:
    """Let Python change threads that often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have the threads that are there already, such as those of pytest-xdist, not count."""
    count = _thread._count
    already = count()

    def others() -> int:
        return count() - already

    with mock.patch.object(_thread, "_count", others):
        yield


@contextlib.contextmanager
def alive() -> Iterator[None]:
    """Have another thread that does nothing."""
    end = threading.Event()
    other = Running([lambda: end.wait(SECONDS)])
    try:
        yield
    finally:
        end.set()
        other.join()


class Pauses(nn.Module):
    """Calls its child, after a pause if it is given one."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor, pause: Callable[[], Any] = lambda: None) -> Any:
        pause()
        return self.child(x)


class Paused:
    """A call of a :class:`Pauses`, in a thread of its own, that has come to the pause."""

    def __init__(
        self, module: Pauses, weights: Any, x: Tensor, call: Any = fcall.functional_call
    ) -> None:
        self._reached, self._on = threading.Event(), threading.Event()
        self._running = Running([lambda: call(module, weights, (x, self._pause))])
        while not self._reached.wait(0.01):
            if self._running.errors:
                self._running.join()

    def _pause(self) -> None:
        self._reached.set()
        assert self._on.wait(SECONDS)

    def finish(self) -> Any:
        """Let it go on, and return what it returned."""
        self._on.set()
        return self._running.join()[0]


@contextlib.contextmanager
def paused(*args: Any, **kwargs: Any) -> Iterator[Paused]:
    """Have a :class:`Paused` call in the block, and at its end see to it that it ends."""
    call = Paused(*args, **kwargs)
    try:
        yield call
    finally:
        call.finish()


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns in a thread of its own."""
    return run(function)[0]
