"""The private modules of torch that :mod:`fcall.compiled` needs, to call what was compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dis import get_instructions
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch

from fcall._torch import (
    OPERATOR_PROBLEM,
    DynamoUnavailableError,
    codes_of,
    pre_dispatch_proxy_mode,
    source_of,
)

__all__ = [
    "artifacts",
    "choose_guards_of_this_trace",
    "compiled_calls",
    "inductor",
]


@functools.cache
def compiled_calls() -> SimpleNamespace:
    """Import what :mod:`fcall.compiled.fast` needs to call what Dynamo compiled by itself.

    Raises:
        DynamoUnavailableError: a name is gone; the message says which one. Calls that go through
            Dynamo need none of them.
    """
    try:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
        from torch._C._dynamo.guards import RootGuardManager, TensorGuards
        from torch._dynamo import eval_frame
        from torch._dynamo import utils as dynamo_utils
        from torch._dynamo.guards import GuardManagerType, GuardManagerWrapper
        from torch._dynamo.mutation_guard import GenerationTracker

        def tensor_check(exact: Sequence[Any], loose: Sequence[Any]) -> Callable[..., bool]:
            """Return the check that tensors are different ones, each like that in its place.

            Of ``loose``, which come after ``exact``, sizes and strides may differ.
            """
            any_size: list[Any] = [[None] * t.dim() for t in loose]
            sizes: Any = [*[list(t.shape) for t in exact], *any_size]
            strides: Any = [*[list(t.stride()) for t in exact], *any_size]
            guards = TensorGuards(
                *exact, *loose, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
            )
            return guards.check

        def version_check(dicts: tuple[dict[Any, Any], ...]) -> Callable[[Any], bool]:
            """Return the check, of the same dicts, that nothing was written to any of them."""
            root = RootGuardManager()
            for i, entries in enumerate(dicts):
                source, kind = f"dicts[{i}]", GuardManagerType.GUARD_MANAGER
                child = root.tuple_getitem_manager(i, source, entries, kind)
                child.add_dict_version_guard(entries, [source], None)
            return root.check

        def entries_of(code: CodeType) -> list[tuple[Any, CodeType]]:
            """Return the guards, and the compiled code, of each compilation of ``code``."""
            entries = [(e.guard_manager, e.code) for e in _debug_get_cache_entry_list(code)]
            return [(guards, code) for guards, code in entries if guards.cache_entry is not None]

        interpreter_stack = torch._C._functorch.peek_interpreter_stack
        dispatch_modes = torch._C._len_torch_dispatch_stack
        is_recorded_by_jit = torch._C._get_tracing_state
        hooks_on_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks
        forward_ad = torch.autograd.forward_ad
        undo_transforms = torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth

        def is_plain() -> bool:
            """Whether nothing around the call takes part in it, but for what guards check."""
            return (
                interpreter_stack() is None
                and not dispatch_modes()
                and not pre_dispatch_proxy_mode()
                and forward_ad._current_level == -1
                and is_recorded_by_jit() is None
                and hooks_on_saved_tensors(True) is None
            )

        def is_usual() -> bool:
            """Whether torch.compile is to compile and run as it does if nobody says otherwise."""
            stance = eval_frame._stance
            return stance.stance == "default" and stance.backend is None

        def begin() -> None:
            """Tell CUDA graphs, as torch.compile does, that outputs of earlier calls may go."""
            GenerationTracker.generation += 1

        dynamo_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
        profiler = torch.autograd.profiler

        def is_unobserved() -> bool:
            """Whether neither Dynamo compiles what is called, nor is it profiled."""
            return dynamo_callback() is None and not profiler._is_profiler_enabled

        class DynamoUtils:
            """The functions that compiled code calls, less what they do while it is profiled."""

            record_pregraph_bytecode_enter = staticmethod(lambda: None)
            record_pregraph_bytecode_exit = staticmethod(lambda _: None)

            def __getattr__(self, name: str) -> Any:
                return getattr(dynamo_utils, name)

        def bare(value: Any) -> Any:
            """Return what a global of compiled code is to be while the code is unobserved."""
            if value is dynamo_utils:
                return DynamoUtils()
            # What Dynamo is kept from by a wrapper, at 1 us a call.
            is_kept = getattr(value, "_torchdynamo_disable", False)
            return getattr(value, "_torchdynamo_orig_callable", value) if is_kept else value

        def unobserved(function: FunctionType) -> FunctionType:
            """Return ``function``, which Dynamo compiled, for calls that are unobserved."""
            codes = [*codes_of([function.__code__])]
            if any(i.opname == "STORE_GLOBAL" for code in codes for i in get_instructions(code)):
                return function
            names = {name for code in codes for name in code.co_names}
            known = function.__globals__
            own = {name: bare(known[name]) for name in names if name in known}
            own["__builtins__"] = known["__builtins__"]
            cells = function.__closure__
            return FunctionType(function.__code__, own, function.__name__, None, cells)

        # Fails here, and not in a call, where these cannot do what they are to do.
        example, entries = torch.zeros(1), {"key": 0}
        works = tensor_check([example], [])(example) and version_check((entries,))((entries,))
        GenerationTracker.generation += 0
        if not works or OPERATOR_PROBLEM or not hasattr(GuardManagerWrapper(), "cache_entry"):
            raise DynamoUnavailableError(OPERATOR_PROBLEM or "GuardManagerWrapper.cache_entry")
        return SimpleNamespace(
            tensor_check=tensor_check,
            version_check=version_check,
            entries_of=entries_of,
            is_plain=is_plain,
            is_usual=is_usual,
            begin=begin,
            is_unobserved=is_unobserved,
            unobserved=unobserved,
            undo_transforms=undo_transforms,
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise DynamoUnavailableError(str(error)) from error


def choose_guards_of_this_trace(
    needed: Callable[[Sequence[Any], Callable[[Any], Any]], Sequence[bool]],
) -> None:
    """Leave out guards of the frame that Dynamo is tracing, once it is traced.

    Public is ``guard_filter_fn``, an option of ``torch.compile``. It has Dynamo make all guards
    twice, and it is asked for the frames of other functions, too, that are called after a graph
    break. Where the names are gone all guards stay, which is right, but slower.

    Args:
        needed: Tells of each guard whether it stays, given a function that returns what a guard is
            on, or None where that cannot be found.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        context = output.tracing_context.guards_context
        scope = {"L": output.local_scope, "G": output.global_scope}

        def value_of(guard: Any) -> Any:
            try:
                return eval(source_of(guard), dict(scope))  # an expression of Dynamo's
            except Exception:  # noqa: BLE001, of something that is not there, or for itself alone
                return None

        def choose() -> None:
            state = context.copy_graphstate()
            keep = needed(list(state.dynamo_guards), value_of)
            dropped = [guard for guard, kept in zip(state.dynamo_guards, keep) if not kept]
            state.dynamo_guards.difference_update(dropped)
            context.restore_graphstate(state)

        output.add_cleanup_hook(choose)
    except (ImportError, AttributeError):
        pass


def inductor(
    mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None
) -> Callable[..., Any]:
    """Return what ``torch.compile`` makes of ``backend="inductor"``, which has no public name.

    Raises:
        AttributeError: where it is gone.
    """
    return torch._TorchCompileInductorWrapper(mode, options, dynamic)


@functools.cache
def artifacts() -> SimpleNamespace:
    """Import what :mod:`fcall.compiled.cache` needs to keep on disk what was compiled.

    Raises:
        DynamoUnavailableError: a name is gone; the message says which one. Then nothing is kept.
    """
    try:
        from torch._dynamo import config as dynamo_config
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
        from torch._dynamo.guards import CheckFunctionManager
        from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState
        from torch._dynamo.package import SerializedCode
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._functorch import config as functorch_config
        from torch._guards import Guard, GuardsSet
        from torch._inductor import config as inductor_config
        from torch._inductor.codecache import CppPythonBindingsCodeCache
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        from torch.utils._ordered_set import OrderedSet

        state_guard = torch._C._dynamo.guards.GlobalStateGuard

        def build_guards(
            code: CodeType,
            scopes: tuple[dict[str, Any], dict[str, Any]],
            guards: Iterable[tuple[Any, Callable[..., None]]],
            settings: dict[str, Any],
        ) -> Any:
            """Return guards, of these sources and kinds, on what is in local and global scope."""
            made = [Guard(source, create) for source, create in guards]
            state = OutputGraphGuardsState(
                *scopes,
                torch_function_mode_stack=[],
                dual_level=forward_ad._current_level,
                functorch_layers=[],
                current_device=torch.utils._device.CURRENT_DEVICE,
                global_state_guard=state_guard(),
                _guards=GuardsSet(OrderedSet(made)),
                _aotautograd_guards=[],
                skip_guards_check=True,
                **settings,
            )
            return CheckFunctionManager(code, OutputGraphCommon(state)).guard_manager

        forward_ad = torch.autograd.forward_ad
        serialized = BundledAOTAutogradSerializableCallable
        configs = (dynamo_config, functorch_config, inductor_config)
        return SimpleNamespace(
            build_guards=build_guards,
            output_of_trace=lambda: InstructionTranslator.current_tx().output,
            # What AOTAutograd returns can be dumped, with the backward, if it was compiled so.
            to_be_dumped=lambda: functorch_config.patch(
                bundled_autograd_cache=True, force_non_lazy_backward_lowering=True
            ),
            dump=lambda fn: serialized.serialize_compile_artifacts(serialized(fn)),
            load=serialized.deserialize_compile_artifacts,
            with_options=inductor_config.patch,
            dump_code=SerializedCode.from_code_object,
            load_code=SerializedCode.to_code_object,
            # The C++ that was built, by keys; and where it is, in a folder that may be deleted.
            libraries=CppPythonBindingsCodeCache.cache,
            cache_dir=cache_dir,
            function_modes=torch._C._len_torch_function_stack,
            global_state=lambda: str(state_guard().__getstate__()),
            settings=lambda: {
                f"{config.__name__}.{name}": value
                for config in configs
                for name, value in config.save_config_portable().items()
            },
        )
    except (ImportError, AttributeError) as error:
        raise DynamoUnavailableError(str(error)) from error
