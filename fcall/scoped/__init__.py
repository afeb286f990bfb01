"""Attributes of modules that differ by scope: by the thread, or the task, that looks.

Values written into a live module can be seen by all that hold it. Where others may look while they
stand there, the module's dicts are replaced by :class:`ScopedDict`, and the values are kept beside
them, in a :class:`Scope` that only the thread or the asyncio task that opened it can see, and what
these start. The dicts themselves, with the module's own tensors, stay as they are.

A scope is a value of a context variable. So tasks that take turns on one thread do not mix, and
scopes may be closed in another order than they were opened.
"""

from fcall.scoped.context import opened
from fcall.scoped.dicts import ScopedDict, own_dict, shows_own
from fcall.scoped.scope import Scope, ScopedCache

__all__ = ["Scope", "ScopedCache", "ScopedDict", "opened", "own_dict", "shows_own"]
