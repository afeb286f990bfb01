"""What code a trace read, in a form that another process can compare with its own.

Dynamo knows code by where it is in memory. Here a function is known by a digest of its bytecode and
constants, a module by the digests of all functions in it and in its classes, as they are in memory:
what was replaced at run time counts, what was only written to a file does not.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch

__all__ = ["NotPortableError", "digest_of_modules", "modules_of", "portable"]


DYNAMO = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "")
"""Where Dynamo has what it traces in place of built-in functions: a part of it, and so of torch."""


class NotPortableError(Exception):
    """Something is known to this process alone."""


def portable(value: Any) -> str:
    """Return a text that tells ``value`` from others as ``is`` does, in any process.

    Raises:
        NotPortableError: there is none.
    """
    if value is None or type(value) in (bool, int, str, type(Ellipsis), type(NotImplemented)):
        return repr(value)
    if isinstance(value, CodeType):
        return f"code {value.co_name} {_digest(value)}"
    if isinstance(value, FunctionType):
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        plain = [
            repr(d) if type(d) in (bool, int, float, str, type(None)) else "" for d in defaults
        ]
        name = f"{value.__module__}.{value.__qualname__}"
        return f"function {name} {_digest(value.__code__)} {plain}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, (BuiltinFunctionType, BuiltinMethodType)):
        owner = value.__self__
        of = "" if owner is None or isinstance(owner, ModuleType) else f" of {portable(owner)}"
        return f"builtin {value.__module__}.{value.__qualname__}{of}"
    raise NotPortableError(f"an object of {type(value).__qualname__} is known by where it is")


def modules_of(codes: Collection[CodeType], classes: Iterable[type]) -> list[str]:
    """Return the names of the modules that hold ``codes`` and ``classes``.

    Raises:
        NotPortableError: some code is in none of the modules that could hold it.
    """
    by_file: dict[str, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        by_file.setdefault(file or "", []).append(name)
    names = {cls.__module__ for cls in classes}
    missing = {code for code in codes if not code.co_filename.startswith(DYNAMO)}
    for name in {name for code in missing for name in by_file.get(code.co_filename, ())} | names:
        held = set(_codes_in(sys.modules[name]))
        if held & missing or name in names:
            names.add(name)
            missing -= held
    if missing:
        where = sorted(f"{code.co_name} in {code.co_filename}" for code in missing)
        raise NotPortableError(f"code cannot be found again: {', '.join(where[:3])}")
    used = {name for code in codes for name in code.co_names}
    for name in names:
        for key, value in vars(sys.modules[name]).items():
            marked = getattr(value, "_dynamo_marked_constant", False)
            if key in used and marked and not name.startswith(("fcall.", "torch.")):
                raise NotPortableError(f"{name}.{key} is constant while it is traced")
    return sorted(names)


def digest_of_modules(names: Iterable[str]) -> dict[str, str]:
    """Return for each module, by name, a digest of the code in it now; empty if it is not here."""
    found = {}
    for name in names:
        module, whole = sys.modules.get(name), hashlib.sha256()
        held = _held_by(module) if module is not None else ()
        texts = (portable(one) if isinstance(one, FunctionType) else one for one in held)
        whole.update("".join(sorted(texts)).encode())  # some modules are filled as needed
        found[name] = whole.hexdigest() if module is not None else ""
    return found


def _codes_in(module: ModuleType) -> Iterator[CodeType]:
    stack = [one.__code__ for one in _held_by(module) if isinstance(one, FunctionType)]
    while stack:
        code = stack.pop()
        yield code
        stack += [const for const in code.co_consts if isinstance(const, CodeType)]


def _held_by(module: ModuleType) -> Iterator[FunctionType | str]:
    """Yield all functions of a module and of its classes, and a text for each constant of these."""
    seen: set[int] = set()
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    stack: list[Any] = own
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if not (value.__module__ or "").startswith("torch._dynamo."):  # around Module.__init__
                yield value
            stack += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        elif isinstance(value, type):
            if value.__module__ == module.__name__:
                yield from _constants_of(value)
                stack += vars(value).values()
        elif isinstance(value, (staticmethod, classmethod, MethodType)):
            stack.append(value.__func__)
        elif isinstance(value, property):
            stack += [value.fget, value.fset, value.fdel]
        elif isinstance(value, functools.partial):
            stack.append(value.func)


def _constants_of(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        plain = type(value) in (bool, int, float, complex, str, bytes, type(None))
        if plain and not name.startswith("___"):  # those are Dynamo's
            yield f"{cls.__qualname__}.{name} = {value!r}"


def _is_filled(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, (FunctionType, type, functools.partial))
    except ValueError:
        return False


@functools.lru_cache(maxsize=20_000)
def _digest(code: CodeType) -> str:
    parts: list[Any] = [code.co_code, code.co_names, code.co_varnames, code.co_freevars]
    parts += [code.co_cellvars, code.co_flags, code.co_name, code.co_argcount]
    parts += [code.co_posonlyargcount, code.co_kwonlyargcount]
    parts += [getattr(code, "co_exceptiontable", b"")]
    text = repr(parts) + "".join(map(_constant, code.co_consts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _digest(value)
    if isinstance(value, (tuple, frozenset)):
        parts = map(_constant, value)
        return repr(sorted(parts) if isinstance(value, frozenset) else list(parts))
    return f"{type(value).__name__} {value!r},"
