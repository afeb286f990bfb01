"""``patch_torch``: code that calls ``torch.func.functional_call`` runs on fcall."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from fcall import _torch, call, errors, stateless

__all__ = ["patch_torch"]

F = TypeVar("F", bound=Callable[..., Any])

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "torch.func": call.functional_call,
    "stateless": stateless.functional_call,
    "stateless, private": stateless.unwarned_functional_call,
}
"""By the kind of a place in :data:`fcall._torch.FUNCTIONAL_CALLS`."""

_lock = threading.Lock()
_entered = 0
"""How many patches are in force, in all threads."""
_replaced: list[tuple[ModuleType, str, Any]] = []
"""What stood in each place before the first of them."""


class patch_torch:
    """Let code that calls ``torch.func.functional_call`` run on :func:`fcall.functional_call`.

    Replaced are ``torch.func.functional_call`` and ``torch.nn.utils.stateless.functional_call``,
    with their private homes, for the whole process and all its threads. Three ways to use it; to
    make one alone does nothing yet:

    - ``with fcall.patch_torch():`` for a block;
    - ``@fcall.patch_torch()`` for each call of a function, also a coroutine or generator
      function, which patches torch until it is done;
    - ``fcall.patch_torch().start()`` for good, or until ``stop()`` of the same object.

    They nest, also across threads: the first one in replaces torch's functions, the last one out
    puts the same objects back. Code that imported ``functional_call`` by name keeps the function it
    has. Before the patch that is torch's, whose inside is replaced: it runs on fcall too, except
    that with several dicts a tensor that the module reassigns is lost, as in torch. Imported during
    a patch it is fcall's, for good. Enter a patch outside of what ``torch.compile`` compiles, which
    then is compiled anew.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = dict(model.named_parameters()), torch.ones(1, 3)
        >>> with fcall.patch_torch(), fcall.record_routes() as routes:
        ...     out = torch.func.functional_call(model, params, x)
        >>> routes
        [Route(module='Linear', kind='eager', reason='')]
        >>> torch.func.functional_call is fcall.functional_call
        False
    """

    def __init__(self) -> None:
        self._started = 0

    def start(self) -> None:
        """Patch torch, until :meth:`stop` was called as often as this."""
        global _entered
        with _lock:
            if not _entered:
                _replace()
            _entered += 1
            self._started += 1

    def stop(self) -> None:
        """Undo one :meth:`start` of this object.

        Raises:
            PatchNotStartedError: there is none left (a ``RuntimeError``).
        """
        global _entered
        with _lock:
            if not self._started:
                raise errors.PatchNotStartedError
            self._started -= 1
            _entered -= 1
            if not _entered:
                _restore()

    def __enter__(self) -> patch_torch:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __call__(self, fn: F) -> F:
        """Return ``fn``, patching torch for the time of each call."""
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await fn(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        if inspect.isgeneratorfunction(fn):

            @functools.wraps(fn)
            def generated(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return (yield from fn(*args, **kwargs))

            return generated  # type: ignore[return-value]

        @functools.wraps(fn)
        def patched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return fn(*args, **kwargs)

        return patched  # type: ignore[return-value]


def _replace() -> None:
    try:
        for kind, module, name in _torch.functional_calls():
            _replaced.append((module, name, getattr(module, name)))
            setattr(module, name, REPLACEMENTS[kind])
    except BaseException:  # an interrupt: all or nothing
        _restore()
        raise


def _restore() -> None:
    while _replaced:
        module, name, original = _replaced[-1]
        setattr(module, name, original)
        _replaced.pop()
