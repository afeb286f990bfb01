"""Which way a call took, and why: asked for with :func:`record_routes`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Route", "record_routes"]

log = logging.getLogger("fcall")

EAGER = "eager"
OPERATOR = "operator"
INLINED = "inlined"
FAST = "fast"
GUARDED = "guarded"


class Route(NamedTuple):
    """The way one call took."""

    module: str
    """The class of the called module."""
    kind: str
    """``"eager"``: run as it is. ``"operator"``: one call of fcall's operator in a captured graph.
    ``"inlined"``: captured, with the module's operations directly in the caller's graph. Of a call
    of what :func:`fcall.compile` returns: ``"fast"``, the compiled code at once, or ``"guarded"``,
    through Dynamo, which compiles it if it has to."""
    reason: str
    """Why it was inlined, or guarded and will be the next time too; else empty."""


recordings: list[list[Route]] = []
"""Where calls are recorded: nowhere, as a rule."""


@contextlib.contextmanager
def record_routes() -> Iterator[list[Route]]:
    """Collect the route of each call made, or traced, inside the ``with`` block.

    A compiled function decides when it is traced: running it again records nothing. A function that
    Dynamo traces more than once records each time. Inlining is also logged, to the logger
    ``"fcall"`` at level INFO.

    Yields:
        A list that grows as calls are made, by any thread.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> params = dict(model.named_parameters())
        >>> with fcall.record_routes() as routes:
        ...     out = fcall.functional_call(model, params, torch.ones(1, 3))
        >>> routes
        [Route(module='Linear', kind='eager', reason='')]
    """
    routes: list[Route] = []
    recordings.append(routes)
    try:
        yield routes
    finally:
        # By identity: two recordings may be equal.
        recordings[:] = [other for other in recordings if other is not routes]


def record(module: str, kind: str, reason: str = "") -> None:
    """Tell the recordings that a call of a ``module`` took a route."""
    if kind == INLINED:
        log.info("the call of %s is inlined: %s", module, reason)
    for routes in list(recordings):
        routes.append(Route(module, kind, reason))
