"""``compile``: one compiled graph for any number of weight sets."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fcall import _torch, errors, routes
from fcall._torch import compiling
from fcall.call import functional_call
from fcall.compiled.cache import Cache
from fcall.compiled.fast import MISS, FastRoute, tensors_in
from fcall.compiled.frames import Compile, Frame, Names, Result, as_plain
from fcall.compiled.inductor import OPTION, LeanInductor
from fcall.compiled.record import Record
from fcall.compiled.structure import Hooks, hooks_of, same_hooks
from fcall.compiled.weight_sets import STATIC_SETS, weight_sets
from fcall.given import Weights, merge, prepare, write_back
from fcall.plan import binding_for

__all__ = ["CompiledCall", "compile"]

KEPT = 16
"""How many frames, routes to them, and tuples of names are kept. The oldest goes first."""


class CompiledCall:
    """What :func:`compile` returns: a module compiled as a function of its weights.

    A call takes one of two routes, and :func:`fcall.record_routes` tells which: *fast*
    (:mod:`fcall.compiled.fast`), if what it depends on is as it was in an earlier call, else
    *guarded*: through Dynamo, which compiles what is not compiled yet.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        compile: Compile,
        cache: Cache | None = None,
        static_sets: int | None = None,
    ) -> None:
        self._cache = cache
        self._static_sets = static_sets
        self.module = module
        self.method = method
        self._called = None if method == "forward" else method
        self._compile = compile
        self._as_given = _AsGiven(module, self._called, compile)
        self._class_name = type(module).__name__
        self._names: dict[tuple[str, ...], Names] = {}
        self._frames: list[Frame] = []
        self._routes: list[FastRoute] = []  # replaced, never written to: other threads read it
        self._lock = threading.Lock()

    def __call__(self, parameter_and_buffer_dicts: Weights, /, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the given weights; compiled at the first call.

        Args:
            parameter_and_buffer_dicts: As for :func:`fcall.functional_call`, also in what of it is
                mutated.
            *args: Positional arguments of the method.
            **kwargs: Keyword arguments of the method.
        """
        dicts = parameter_and_buffer_dicts
        if torch.compiler.is_dynamo_compiling():  # a part of the caller's graph
            return functional_call(self.module, dicts, args, kwargs, method=self._called)
        given = dicts if type(dicts) is dict else merge(dicts)
        for route in self._routes:
            result = route.call(given, args, kwargs)
            if result is not MISS:
                if routes.recordings:
                    routes.record(self._class_name, routes.FAST)
                out, changed = result
                return self._finish(dicts, route.names, result) if changed else out
        return self._call_through_dynamo(dicts, given, args, kwargs)

    def __repr__(self) -> str:
        return f"fcall.compile({self._class_name}, method={self.method!r})"

    def _call_through_dynamo(
        self, dicts: Weights, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not _torch.OPERATOR_PROBLEM and _torch.in_proxy_mode():  # to be recorded by make_fx
            return functional_call(self.module, dicts, args, kwargs, method=self._called)
        inputs = tensors_in(args, kwargs)
        reason = _against_frames(inputs)
        if not reason:
            _, _, substitution, _ = prepare(
                self.module,
                dicts,
                (args, kwargs),
                tie_weights=True,
                strict=False,
                method=self._called,
            )
            names = self._names_for(tuple(given))
            weights = names.weights_of(given)
            kept = [store.get(key, None) for _, (store, key) in substitution.kept]
            reason = _against_tensors(weights, [*weights, *kept, *(inputs or ())])
        routes.record(self._class_name, routes.GUARDED, reason)
        if reason:
            before = dict(given)
            out = self._as_given(dicts, args, kwargs)
            if self._static_sets is not None:
                pairs = enumerate(merge(dicts).items())
                new = {i: value for i, (name, value) in pairs if value is not before[name]}
                self._write_back(dicts, list(before), new)
            return out
        own = {id(tensor) for tensor in (*self.module.parameters(), *self.module.buffers())}
        plain = tuple([as_plain(weight, own) for weight in weights])
        frame = self._frame_for(names, plain)
        run: Callable[..., Result] = frame
        if self._cache is not None:
            run = partial(self._cache.call, frame)
        route = None
        if not frame.breaks:  # before the call, which may change what it is compiled for: strides
            route = FastRoute(self.module, names, frame, weights, kept, inputs or ())
        result = run(plain, args, kwargs)
        compilations = frame.compilations()
        frame.breaks = not compilations
        if route is not None and compilations:
            route.compilations = compilations
            self._add_route(route)
        return self._finish(dicts, names, result)

    def _finish(self, dicts: Weights, names: Names, result: Result) -> Any:
        """Write back what the module reassigned, and return the output."""
        out, changed = result
        if changed:
            by_slot = dict(changed)
            slots = enumerate(names.slot_of.values())
            new = {number: by_slot[slot] for number, slot in slots if slot in by_slot}
            self._write_back(dicts, list(names.slot_of), new)
        return out

    def _write_back(self, dicts: Weights, names: list[str], new: dict[int, Tensor]) -> None:
        if self._static_sets is not None:  # the next call writes to what a CUDA graph has put out
            new = {number: value.clone() for number, value in new.items()}
        write_back(dicts, names, new)

    def _names_for(self, given: tuple[str, ...]) -> Names:
        binding = binding_for(self.module, given, tie_weights=True, strict=False)
        names = self._names.get(given)
        if names is None or names.binding is not binding:
            names = Names(given, binding)
            with self._lock:
                _keep_newest(self._names, given, names)
        return names

    def _frame_for(self, names: Names, weights: tuple[Tensor, ...]) -> Frame:
        with self._lock:
            alike = [
                frame
                for frame in self._frames
                if frame.is_for(self.module, names) and frame.accepts(*weights)
            ]
            sets = alike[0].sets if alike else weight_sets(weights, self._static_sets)
            is_static = sets is not None and sets.take(weights)
            for frame in alike:
                if frame.is_static is is_static:
                    return frame
            record = Record() if self._cache is not None else None
            arguments = self.module, self._called, names, weights, self._compile, record
            frame = Frame(*arguments, sets, is_static)
            self._frames = [frame, *self._frames[: KEPT - 1]]
            return frame

    def _add_route(self, route: FastRoute) -> None:
        with self._lock:
            others = [other for other in self._routes if other.key != route.key]
            self._routes = [route, *others[: KEPT - 1]]


class _AsGiven:
    """The call as it is given, compiled with all of Dynamo's guards.

    And with one that Dynamo leaves out to save time: that the hooks of the module are the same.
    """

    def __init__(self, module: nn.Module, method: str | None, compile: Compile) -> None:
        self._module, self._method, self._compile = module, method, compile
        self._hooks: Hooks = []
        self._compiled = self._new()

    def __call__(self, dicts: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks = hooks_of(self._module)
        if not same_hooks(hooks, self._hooks):
            self._hooks, self._compiled = hooks, self._new()
        return self._compiled(dicts, args, kwargs)

    def _new(self) -> Callable[..., Any]:
        module, method = self._module, self._method

        def call(weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return functional_call(module, weights, args, kwargs, method=method)

        # Dynamo counts compilations, and gives up on too many, by code object.
        call.__code__ = call.__code__.replace()
        return self._compile(call, False, None, False)


def _against_frames(inputs: list[Tensor] | None) -> str:
    """Return why a call has to be compiled as it is given, or an empty string."""
    try:
        calls = compiling.compiled_calls()
        _torch.dynamo()
    except _torch.DynamoUnavailableError as error:
        return f"torch {torch.__version__} lacks what fast calls need: {error}"
    if not calls.is_plain():
        return "it is in a trace, in a transform of torch.func, or under a mode or hooks"
    return "an argument may hold tensors out of sight" if inputs is None else ""


def _against_tensors(weights: Sequence[Any], all_tensors: Sequence[Any]) -> str:
    if not weights:
        return "it is given no weights"
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
        return "a weight is of a subclass of torch.Tensor"
    if len(set(map(id, all_tensors))) < len(all_tensors):
        return "one tensor is given in two places"
    return ""


def _keep_newest(cache: dict[Any, Any], key: Any, value: Any) -> None:
    cache.pop(key, None)
    for oldest in list(cache)[: 1 - KEPT]:
        del cache[oldest]
    cache[key] = value


def compile(
    module: nn.Module,
    *,
    method: str = "forward",
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    static_sets: int | None = None,
) -> CompiledCall:
    """Compile ``module`` as a function of its parameters and buffers.

    The weights are inputs of the compiled graph: a call with other values compiles nothing, if
    shapes, strides, dtypes and ``requires_grad`` are the same. Neither the order of the names, nor
    the kinds and the number of the mappings, nor whether a value is a ``Parameter`` matters; while
    it is traced, the module sees plain tensors.

    Args:
        module: The module. It is not changed, and kept alive by what is returned.
        method: The method to compile; with ``"forward"`` hooks run, too.
        backend: As for :func:`torch.compile`.
        mode: As for :func:`torch.compile`.
        dynamic: As for :func:`torch.compile`.
        options: As for :func:`torch.compile`.
        cache: A folder for what is compiled, so that another process need not: the first call of
            a kind takes it from there, if it is for the same versions, module and code. Only for
            Inductor. It holds native code, and is to be trusted like code.
        static_sets: Where CUDA graphs are recorded, as with ``mode="reduce-overhead"``: how many
            sets of weights have a graph of their own, which reads them where they are; 8 if nothing
            is said. It is the first set, and those whose addresses come back. Others are copied to
            where one more graph reads them, which is compiled once there are some; with 0 all.

    Returns:
        A callable ``f(parameter_and_buffer_dicts, *args, **kwargs)``. With CUDA graphs, the next
        call writes to the memory of its outputs: clone what is kept.

    Raises:
        StaticSetsError: ``static_sets`` is no such number, or there are no CUDA graphs
            (``ValueError``).
        UncachedBackendError: ``cache`` is given for another backend (``ValueError``).
        UnknownMethodError: the module has no such method; raised at the first call.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> f = fcall.compile(model)
        >>> x = torch.ones(1, 3)
        >>> f({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, x)
        tensor([[0., 0.]])
        >>> f({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, x)  # nothing is compiled
        tensor([[3., 3.]])
    """
    settings = options or {}
    can_be_lean = backend == "inductor" and not settings.keys() & OF_INDUCTOR
    lean = LeanInductor(mode, settings, dynamic) if can_be_lean else None
    has_graphs = lean is not None and lean.records_cuda_graphs
    most = sys.maxsize if lean is not None and lean.compares_addresses else 0
    if static_sets is None:
        static_sets = min(STATIC_SETS, most) if has_graphs else None
    elif not has_graphs or type(static_sets) is not int or not 0 <= static_sets <= most:
        asked = f"with backend={backend!r}, mode={mode!r}, options={options!r}"
        errors.fail(errors.StaticSetsError, static_sets, asked)
    kept = None
    if cache is not None:
        if lean is None:
            errors.fail(errors.UncachedBackendError, backend)
        kept = Cache(cache, lean)

    def compile(
        fn: Callable[..., Any],
        is_checked: bool,
        record: Record | None,
        is_static: bool,
    ) -> Callable[..., Any]:
        """Return ``torch.compile`` of ``fn`` with these settings."""
        if is_checked and lean is not None:
            static_in = fn.__code__ if is_static else None
            own = LeanInductor(mode, settings, dynamic, record, static_in)
            seen = None if record is None else {"guard_filter_fn": record.see_guards}
            return _compile(fn, own, None, dynamic, seen)
        return _compile(fn, backend, mode, dynamic, options)

    return CompiledCall(module, method, compile, kept, static_sets)


OF_INDUCTOR = {OPTION, "guard_filter_fn", "use_aoti"}
"""Options with which Inductor is not made lean."""


def _compile(
    fn: Callable[..., Any],
    backend: str | Callable[..., Any],
    mode: str | None,
    dynamic: bool | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    own = None if options is None else dict(options)  # torch.compile takes some of them out
    return torch.compile(fn, backend=backend, mode=mode, dynamic=dynamic, options=own)
