"""``stack_module_state``: the parameters and buffers of models that are alike, stacked by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fcall import errors
from fcall.binding import refuse_lazy

__all__ = ["stack_module_state"]


def stack_module_state(
    models: Sequence[nn.Module] | nn.ModuleList, *, remove_duplicate: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stack the parameters and buffers of models that differ in their values only.

    A drop-in replacement for :func:`torch.func.stack_module_state`, which stacks models that are
    not alike without a word: of other submodules, modes of submodules, or ties. Also works in a
    function under ``torch.compile(fullgraph=True)``.

    Args:
        models: The models, at least one. Not mutated.
        remove_duplicate: Whether a tensor with several names, being tied or of a shared submodule,
            is there under the first of them alone. :func:`fcall.functional_call` gives it to all.
            With ``False`` it is there under each, as one and the same stacked tensor.

    Returns:
        Two dicts, of parameters and of buffers, from names to tensors with a new first dimension,
        ``len(models)`` long. They are copies, and leaves that require a gradient where those of the
        models do. In a function under ``torch.compile`` they require none, since no graph can
        return new leaves: use ``torch.func.grad``, or call ``requires_grad_()`` on what it returns.

    Raises:
        LazyModuleError: a model has parameters that are not made yet (a ``RuntimeError``).
        NoModelsError: there are no models (a ``RuntimeError``).
        UnlikeModelsError: the models differ in their submodules or modes, or in names, ties,
            shapes, dtypes, devices or ``requires_grad`` of their state (a ``RuntimeError``).

    Example::

        >>> import fcall, torch
        >>> models = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> params, buffers = fcall.stack_module_state(models)
        >>> {name: tuple(p.shape) for name, p in params.items()}
        {'weight': (4, 2, 3), 'bias': (4, 2)}
        >>> base = fcall.meta_copy(models[0])
        >>> call = torch.vmap(lambda p, x: fcall.functional_call(base, p, x), in_dims=(0, None))
        >>> call(params, torch.ones(5, 3)).shape
        torch.Size([4, 5, 2])

    The semantics are those of torch.func 2.13, but for the models that are refused.
    """
    if len(models) == 0:
        errors.fail(errors.NoModelsError)
    _check_alike(models)
    params = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    buffers = [dict(model.named_buffers(remove_duplicate=False)) for model in models]
    return _stack(params, remove_duplicate), _stack(buffers, remove_duplicate)


def _stack(states: list[dict[str, Any]], remove_duplicate: bool) -> dict[str, Tensor]:
    stacks: dict[str, Tensor] = {}
    first_names: dict[Tensor, str] = {}
    for name, tensor in states[0].items():
        first = first_names.setdefault(tensor, name)  # tensors are hashed by identity
        if first == name:
            stack = torch.stack([state[name].detach() for state in states])
            if tensor.requires_grad and not torch.compiler.is_dynamo_compiling():
                stack.requires_grad_()
            stacks[name] = stack
        elif not remove_duplicate:
            stacks[name] = stacks[first]
    return stacks


def _check_alike(models: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Refuse models that differ from the first, or are not ready."""
    for model in models:
        refuse_lazy(model, (*model.named_parameters(), *model.named_buffers()))
    expected = dict(_traits(models[0]))
    for index, model in enumerate(models):
        traits = dict(_traits(model))
        for trait in (*traits, *expected):
            got, wanted = traits.get(trait, "missing"), expected.get(trait, "missing")
            if got != wanted:
                got, wanted = _shown(got), _shown(wanted)
                errors.fail(errors.UnlikeModelsError, index, trait, got, wanted)


def _traits(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what has to be equal in all models, with a name for it; the telling things first."""
    for path, part in model.named_modules(remove_duplicate=False):
        what = repr(path) if path else "the model"
        yield f"the class of {what}", type_before_parametrizations(part)
        yield f"the mode of {what}", "train" if part.training else "eval"
    first_names: dict[Tensor, str] = {}
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            yield f"the kind of {name!r}", kind
            yield f"the first name of {name!r}", first_names.setdefault(tensor, name)
            yield f"the shape of {name!r}", tuple(tensor.shape)
            yield f"the dtype of {name!r}", str(tensor.dtype)
            yield f"the device of {name!r}", str(tensor.device)
            yield f"requires_grad of {name!r}", tensor.requires_grad


def _shown(value: Any) -> str:
    return value.__qualname__ if isinstance(value, type) else str(value)
