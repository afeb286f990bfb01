"""What others do for the same, where they are installed: tensordict, and JAX.

``make perf PEERS=1`` installs them, in the versions of ``peers.txt``, in a venv of their own, and
runs all contenders there, in one process. JAX is given one thread on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Calls = dict[str, Callable[..., Any]]


class Absent(Exception):
    """A contender is not there, for the reason that it says."""


def ask(peer: str, what: str, *args: Any, **options: Any) -> Calls:
    """Return the contenders of ``peer`` (``with_<peer>.py``) for ``what``.

    Where it is not installed, that is one which raises :class:`Absent`.
    """
    try:
        there = importlib.import_module(f"perf.with_{peer.lower()}")
    except (ImportError, Absent) as error:
        return {peer if what == "eager" else f"{peer}, compiled": absent(error)}
    return getattr(there, what)(*args, **options)  # type: ignore[no-any-return]


def absent(error: Exception) -> Callable[..., Any]:
    """Return what raises :class:`Absent` when it is called."""

    def call(*_: Any) -> Any:
        raise Absent(str(error))

    return call
