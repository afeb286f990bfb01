"""Compiled calls on disk: what a process compiled, for a later one that has not.

A file holds one compilation, for one kind of call: what Inductor made, the bytecode by which Dynamo
calls it, and Dynamo's guards. So a warm start neither traces nor compiles. That is right only if a
trace would find now what it found then. In this order:

===========================================  ====================================================
what is compared with the process before     how
===========================================  ====================================================
the bytes of the file                        a digest
versions, device, settings of the compiler   :func:`_environment`
how the module is built, what names mean     :func:`_structure`; a module with hooks is not kept
the code that the trace read                 :func:`fcall.compiled.sources.digest_of_modules`
weights, inputs, other arguments, modes      the name of the file: another kind, another file
all else that Dynamo guards: attributes,     the guards are made anew, on what is here now: the
globals, closures, constants, functions      text of each has to be what it was, with functions
                                             and classes in place of their addresses
===========================================  ====================================================

The guards that were made anew hold for later calls, as those of a compilation of this process do.
Where something differs, or cannot be told, the call is compiled. A file holds pickles and native
code: who may write to the folder may run code in the process that reads it.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import importlib
import itertools
import json
import os
import pickle
import platform
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fcall import _torch, errors
from fcall._torch import compiling
from fcall.compiled.frames import Compilation, Frame, Result
from fcall.compiled.inductor import LeanInductor
from fcall.compiled.record import Trace
from fcall.compiled.sources import NotPortableError, digest_of_modules, modules_of, portable
from fcall.compiled.structure import hooks_of
from fcall.passes import STORES

__all__ = ["Cache"]

MAGIC = b"fcall compiled call 1\n"
ADDRESS = re.compile(r"___check_(?:obj|type)_id\((.*), (\d+)\)")
"""A guard on what is at an address."""


class _StaleError(Exception):
    """A file is not for this process; the message says why."""


class Cache:
    """The compiled calls of modules in one folder."""

    def __init__(self, folder: str | os.PathLike[str], inductor: LeanInductor) -> None:
        self._folder = Path(folder)
        self._inductor = inductor

    def call(
        self, frame: Frame, weights: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: Any
    ) -> Result:
        """Call a frame, by what is kept for such calls, if it has compiled nothing for them."""
        variables = {**frame.scope, "weights": weights, "args": args, "kwargs": kwargs}
        found = next((known for known in frame.compilations() if known.holds(variables)), None)
        path = None
        if found is None and compiling.compiled_calls().is_usual():
            path = self._path_for(frame, weights, args, kwargs)
            found = self._load(path, frame, variables) if path is not None else None
        if isinstance(found, Restored):
            return found(weights, args, kwargs)  # type: ignore[no-any-return]
        result = frame(weights, args, kwargs)
        if path is not None:
            self._save(path, frame, variables)
        return result

    def _path_for(
        self, frame: Frame, weights: Sequence[Tensor], args: Any, kwargs: Any
    ) -> Path | None:
        """Return where a call like this is kept, or None if such calls are not."""
        try:
            torchs = compiling.artifacts()
            leaves, spec = _torch.pytree.tree_flatten((args, kwargs))
            parts: list[Any] = [_name(type(frame.module)), frame.method, frame.slots, frame.index]
            parts.append(frame.is_static)
            parts += [self._inductor.settings, str(spec), torchs.global_state()]
            parts += [torch.is_inference_mode_enabled(), torchs.function_modes()]
            parts += [list(map(_kind, weights)), list(map(_kind, leaves))]
        except (NotPortableError, _torch.DynamoUnavailableError) as error:
            _warn(f"a call of {_name(type(frame.module))} is not kept: {error}")
            return None
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        return self._folder / f"{type(frame.module).__name__}-{key}.fcall"

    def _load(self, path: Path, frame: Frame, variables: dict[str, Any]) -> Compilation | None:
        """Return, and restore, what is kept for a call of ``frame`` with these arguments."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            payload = _unpacked(data, frame)
            found = self._restored(frame, variables, payload)
            frame.restored = [*(old for old in frame.restored if old.is_current()), found]
            return found
        except _StaleError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001, whatever is not as it was
            reason = f"{type(error).__name__}: {error}"
        _warn(f"{path} is not used, and written anew: {reason}")
        return None

    def _save(self, path: Path, frame: Frame, variables: dict[str, Any]) -> None:
        """Keep what was compiled last for ``frame``, in a call with these arguments."""
        trace = frame.record.take() if frame.record is not None else None
        try:
            if trace is None:
                raise NotPortableError("the module breaks the graph")
            data = _packed(frame, variables, trace)
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        except Exception as error:  # noqa: BLE001, the call itself went well
            what = str(error) if isinstance(error, NotPortableError) else repr(error)
            _warn(f"a compiled call of {_name(type(frame.module))} is not kept: {what}")

    def _restored(
        self, frame: Frame, variables: dict[str, Any], payload: dict[str, Any]
    ) -> Compilation:
        torchs = compiling.artifacts()
        guards = _Guards(frame, variables, payload["recipe"])
        for before, now in itertools.zip_longest(payload["text"], guards.text):
            if before != now:
                raise _StaleError(f"it needs {before}, and here is {now}")
        if not guards.manager.root.check(variables):
            raise _StaleError("its guards do not hold")
        folder = Path(torchs.cache_dir())
        for name, library in payload["libraries"].items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _write(folder / name, library)
        # At a reset Dynamo tells its backends, and forgets them: this has it tell us of the next.
        torch.compile(lambda: None, backend=self._inductor)
        with torchs.with_options(self._inductor.patches):
            guards.globals[payload["name"]] = torch.compiler.disable(
                torchs.load(payload["compiled"])
            )
        code = torchs.load_code(payload["code"])
        run, is_recorded = frame.function(code, guards.globals), self._inductor.records_cuda_graphs
        return Restored(guards.manager, run, guards.alive, is_recorded=is_recorded)


def _packed(frame: Frame, variables: dict[str, Any], trace: Trace) -> bytes:
    """Return the bytes of a file."""
    torchs = compiling.artifacts()
    held = [known for known in frame.compilations() if known.holds(variables)]
    if not held:
        raise NotPortableError("the module breaks the graph")
    code = held[0].run.__code__
    (name,) = {name for name in code.co_names if name.startswith("__compiled_fn")}
    if not trace.is_static:
        raise NotPortableError("it is for tensors of any size")
    if hooks_of(frame.module):
        raise NotPortableError("the module has hooks")
    if getattr(trace.compiled, "serialize", None) is None:
        raise NotPortableError("the caches of Inductor, which keep the same, are switched off")
    unknown = _globals_used(code) - {name, *trace.imports, *frame.globals, *vars(builtins)}
    unknown -= {trace.settings["name_of_builtins_dict_key_in_fglobals"]}
    if unknown:
        raise NotPortableError(f"its code uses {sorted(unknown)}")
    classes = {cls for owner in frame.module.modules() for cls in type(owner).__mro__}
    traced = [code for code in trace.codes if code != frame.code]  # that is in the class
    header = {
        "environment": _environment(),
        "structure": _structure(frame),
        "sources": digest_of_modules(modules_of(traced, classes | {Frame})),
    }
    recipe = {"guards": trace.guards, "settings": trace.settings, "imports": trace.imports}
    payload = {
        "recipe": recipe,
        "text": _Guards(frame, variables, recipe).text,
        "code": torchs.dump_code(code),
        "name": name,
        "compiled": torchs.dump(trace.compiled),
        "libraries": trace.libraries,
    }
    head = json.dumps(header).encode()
    body = len(head).to_bytes(8, "big") + head + pickle.dumps(payload)
    return MAGIC + hashlib.sha256(body).digest() + body


def _unpacked(data: bytes, frame: Frame) -> dict[str, Any]:
    """Return what a file holds, if it is whole and made by code like that of this process."""
    start = len(MAGIC) + 32
    body = data[start:]
    if not data.startswith(MAGIC):
        raise _StaleError("it is no file of this version of fcall")
    if hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        raise _StaleError("it is damaged")
    end = 8 + int.from_bytes(body[:8], "big")
    header = json.loads(body[8:end])
    for what, now in _environment().items():
        before = header["environment"].get(what)
        if before != now:
            raise _StaleError(f"it was made with {what} {before}, and here is {now}")
    if header["structure"] != _structure(frame):
        raise _StaleError("the module is built in another way")
    if hooks_of(frame.module):
        raise _StaleError("the module has hooks")
    here = digest_of_modules(header["sources"])
    changed = [name for name, digest in header["sources"].items() if here[name] != digest]
    if changed:
        raise _StaleError(f"the code has changed of {', '.join(changed)}")
    return pickle.loads(body[end:])  # type: ignore[no-any-return]


class Restored(Compilation):
    """A compilation by another process."""

    __slots__ = ("_alive", "_is_recorded", "_resets")

    def __init__(
        self, guards: Any, run: FunctionType, alive: list[Any], *, is_recorded: bool
    ) -> None:
        super().__init__(guards, run)
        self._alive = alive  # what guards know by its address, which none may have after it
        self._is_recorded, self._resets = is_recorded, LeanInductor.resets

    def is_current(self) -> bool:
        """Whether it can be right for any frame: a reset frees the memory of CUDA graphs."""
        return not self._is_recorded or self._resets == LeanInductor.resets

    def holds(self, scope: dict[str, Any]) -> bool:
        """Whether the code is right for a frame with these variables."""
        return self.is_current() and self._check(scope)


class _Guards:
    """Guards made on what is here now, and a text that tells what they check, in any process."""

    def __init__(self, frame: Frame, variables: dict[str, Any], recipe: dict[str, Any]) -> None:
        settings = recipe["settings"]
        modules = {key: importlib.import_module(name) for key, name in recipe["imports"].items()}
        self.globals = {**frame.globals, **modules, "__builtins__": vars(builtins)}
        self.globals[settings["name_of_builtins_dict_key_in_fglobals"]] = vars(builtins)
        self.manager = compiling.artifacts().build_guards(
            frame.code, (variables, self.globals), recipe["guards"], settings
        )
        self.alive: list[Any] = []
        scope = {"L": variables, "G": self.globals}
        self.text = [self._portable(line, scope) for line in str(self.manager).splitlines()]

    def _portable(self, line: str, scope: dict[str, Any]) -> str:
        if "___dict_version" in line:
            raise NotPortableError(f"a guard is on the version of a dict: {line}")
        found = ADDRESS.search(line)
        if not found:
            return line.rstrip()
        try:
            value = eval(found[1], scope)  # an expression of Dynamo's
        except Exception as error:
            raise NotPortableError(f"a guard is on {found[1]}") from error
        if "___check_type_id" in found[0]:
            value = type(value)
        if id(value) != int(found[2]):
            raise NotPortableError(f"a guard is on {found[1]}")
        self.alive.append(value)
        return f"{line[: found.start()]}{found[1]} is {portable(value)}"


def _environment() -> dict[str, str]:
    """Return what code that was compiled before depends on, besides what was compiled."""
    cuda = torch.cuda.is_available()
    return {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "precision": f"{torch.get_float32_matmul_precision()} {torch.backends.mkldnn.enabled}",
        "cuDNN": f"{torch.backends.cudnn.enabled} {torch.backends.cudnn.benchmark}",
        "GPU": f"{torch.cuda.get_device_properties()} {torch.version.cuda}" if cuda else "none",
        **{name: _text(value) for name, value in compiling.artifacts().settings().items()},
    }


def _text(value: Any) -> str:
    """Return a text for a setting, the same in each process."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(map(_text, value))}"
    return (
        f"{value.__module__}.{value.__qualname__}"
        if hasattr(value, "__qualname__")
        else repr(value)
    )


def _structure(frame: Frame) -> str:
    """Return a digest of how a module is built, and of what names mean in it."""
    first: dict[int, int] = {}
    parts: list[Any] = [frame.binding]
    for path, owner in frame.module.named_modules(remove_duplicate=False):
        number = first.setdefault(id(owner), len(first))
        keys = [[k for k, v in getattr(owner, s).items() if v is not None] for s in STORES]
        classes = [_name(cls) for cls in type(owner).__mro__]
        parts.append((path, number, classes, keys, list(owner._modules)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kind(value: Any) -> str:
    """Return what has to be the same of a weight or an argument."""
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
        flags = value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference()
        parts = type(value).__name__, value.dtype, value.device, value.shape, value.stride(), flags
        return str(parts)
    if isinstance(value, Tensor):
        raise NotPortableError(f"it is given a {type(value).__name__} that is not strided")
    return f"{_name(type(value))} {value!r}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _globals_used(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return own.union(*map(_globals_used, inner))


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step: who reads it sees all of it, or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _warn(message: str) -> None:
    warnings.warn(f"fcall: {message}", errors.FcallWarning, stacklevel=2)
