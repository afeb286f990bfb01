"""Dynamo and the dicts that stand in for a module's own while a call is under way beside others.

Compiled code is traced and runs on the module's own dicts, in threads that see these. One that sees
the values of a call runs what it finds uncompiled: Dynamo cannot know to whom a value is shown.
"""

from __future__ import annotations

import contextlib
import functools

from fcall import _torch
from fcall.scoped import ScopedDict, shows_own

__all__ = ["teach_dynamo"]

PROBLEM = "fcall: the module has the values of a functional_call that other threads do not see"


@functools.cache
def teach_dynamo() -> None:
    """Teach Dynamo how to trace a :class:`ScopedDict`. Doing it twice does nothing."""
    with contextlib.suppress(_torch.DynamoUnavailableError):  # then it breaks graphs there
        _torch.trace_as_plain_dict(ScopedDict, shows_own, PROBLEM)
