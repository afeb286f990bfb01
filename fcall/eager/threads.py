"""What a module's forward starts on other threads sees the values given to the call.

So it does where values are written into the module. Where they stand beside it, the context has to
go along, which Python leaves to who starts a thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any

from fcall.eager.swap import active, is_ours, ours

__all__ = ["take_context_along"]


def take_context_along() -> None:
    """Have threads and executors take the context of a call along. Doing it twice does nothing."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    if is_ours(start):
        return

    @functools.wraps(start)
    def start_in_context(self: threading.Thread) -> None:
        if active():
            context, run = copy_context(), self.run

            def run_in_context() -> None:
                del self.run  # ends the cycle of references
                context.run(run)

            self.run = run_in_context  # type: ignore[method-assign]
        start(self)

    @functools.wraps(submit)  # type: ignore[arg-type]
    def submit_in_context(
        self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        if not active():
            return submit(self, fn, *args, **kwargs)
        fn = functools.partial(copy_context().run, fn)
        # It may start a worker, which is to have nothing of this call but fn.
        return Context().run(submit, self, fn, *args, **kwargs)

    threading.Thread.start = ours(start_in_context)  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_in_context  # type: ignore[method-assign, assignment]


take_context_along()
