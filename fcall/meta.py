"""Copies of modules with other tensors in them: on meta, or with given values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

__all__ = ["base_copy", "copy_with", "like", "meta_copy", "registered_tensors"]

M = TypeVar("M", bound=nn.Module)


def meta_copy(module: M) -> M:
    """Copy a module with all of its tensors on meta, without ever copying a value.

    For the module that :func:`fcall.functional_call` needs when all values live elsewhere, stacked
    for instance. ``copy.deepcopy(module).to("meta")`` needs the memory of a full copy for a moment,
    and its result is without the ties of ``module``.

    Args:
        module: The module to copy. Not mutated; its tensors are not read.

    Returns:
        A deep copy of ``module`` without a tensor off meta: each of its parameters, buffers and
        other tensors has one twin on meta, of the same class, shape, strides and dtype and with the
        same ``requires_grad``. So what is one tensor in ``module`` is one tensor in the copy.
        Submodules, hooks, modes and plain attributes are as in ``copy.deepcopy(module)``; a hook
        that is a function, and not a method, is shared with ``module``. Gradients are left out.

    Example::

        >>> import fcall, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> model[1].weight = model[0].weight
        >>> base = fcall.meta_copy(model)
        >>> base[1].weight is base[0].weight
        True
        >>> base[0].weight.device
        device(type='meta')
        >>> params = dict(model.named_parameters())
        >>> fcall.functional_call(base, params, torch.ones(1, 3)).shape
        torch.Size([1, 3])

    The semantics are those of :func:`copy.deepcopy` and :meth:`torch.nn.Module.to`.
    """
    twins = {id(tensor): _meta_twin(tensor) for tensor in registered_tensors(module)}
    with _CopiesOfTensors(_meta_twin):
        return copy.deepcopy(module, twins)


def base_copy(module: M) -> M:
    """Copy a module with its parameters and buffers on meta; other tensors keep their values."""
    twins = {id(tensor): _meta_twin(tensor) for tensor in registered_tensors(module)}
    with _CopiesOfTensors(lambda tensor: tensor.detach().clone()):
        return copy.deepcopy(module, twins)


def copy_with(module: M, values: Mapping[int, Tensor]) -> M:
    """Copy a module with given tensors, by the ids of the ones whose places they take."""
    return copy.deepcopy(module, dict(values))


def like(tensor: Tensor, data: Tensor, requires_grad: bool) -> Tensor:
    """Return ``data`` as what ``tensor`` is: a parameter of its class, or a plain tensor."""
    if isinstance(tensor, nn.Parameter):
        # A subclass of Tensor can be a parameter without being of the class Parameter.
        of_class = issubclass(type(tensor), nn.Parameter)
        cls = type(tensor) if of_class else nn.Parameter
        return cls(data, requires_grad)
    return data.requires_grad_(requires_grad)


def registered_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of all submodules, each at least once."""
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor


def _meta_twin(tensor: Tensor) -> Tensor:
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        make: Any = type(tensor)
        return make(tensor.requires_grad, device="meta", dtype=tensor.dtype)  # type: ignore[no-any-return]
    return like(tensor, torch.empty_like(tensor.detach(), device="meta"), tensor.requires_grad)


class _CopiesOfTensors(TorchFunctionMode):
    """Within it ``copy.deepcopy`` copies a tensor by ``copied``.

    Parameters and buffers are better given in deepcopy's memo, which keeps their class. This is for
    the tensors in plain attributes, lists and the like, which there is no list of.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Parameter.__deepcopy__ asks no mode, but it calls clone.
        if func is Tensor.__deepcopy__ or func is Tensor.clone:
            return self.copied(args[0])
        return func(*args, **(kwargs or {}))
