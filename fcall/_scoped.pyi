"""The base class of fcall.scoped.ScopedDict, in C."""

from contextvars import ContextVar
from typing import Any

REVISION: int

def scoped_base(open_scopes: ContextVar[Any], absent: Any) -> type[Any]: ...
