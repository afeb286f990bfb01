"""Batch norm without running statistics, which can be called under ``vmap``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fcall import _torch

__all__ = ["replace_all_batch_norm_modules_", "replaced_batch_norms"]

Module = TypeVar("Module", bound=nn.Module)

_MARK = "fcall_running_statistics_removed"
"""An attribute rather than a table on the side, so that copies and pickles are marked, too."""


def replace_all_batch_norm_modules_(root: Module) -> Module:
    """Take the running statistics from each batch norm in ``root``, in place.

    A batch norm writes its statistics in place, which ``vmap`` cannot do to buffers that all
    members share. Without them it normalises by the statistics of its batch, also in ``eval()``.
    Where that is not wanted, stack the buffers and map over them instead.

    Args:
        root: The module. Mutated: of each ``BatchNorm1d``, ``2d`` and ``3d``, lazy or not, each
            ``SyncBatchNorm`` and each subclass, the buffers ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` become ``None`` and ``track_running_stats`` ``False``.

    Returns:
        ``root`` itself.

    Example::

        >>> import torch
        >>> from fcall import functional_call
        >>> from fcall.func import replace_all_batch_norm_modules_, stack_module_state, vmap
        >>> models = [torch.nn.Sequential(torch.nn.BatchNorm1d(3)) for _ in range(2)]
        >>> models = [replace_all_batch_norm_modules_(model) for model in models]
        >>> params, buffers = stack_module_state(models)
        >>> x = torch.rand(5, 3)
        >>> vmap(lambda p: functional_call(models[0], p, x))(params).shape
        torch.Size([2, 5, 3])

    The semantics are those of torch.func 2.13; :func:`fcall.batch_norm.replaced_batch_norms` tells
    what was replaced.
    """
    for module in root.modules():
        if isinstance(module, _torch.BatchNorm) and module.track_running_stats:
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
            setattr(module, _MARK, True)
    return root


def replaced_batch_norms(root: nn.Module) -> list[str]:
    """Return which submodules :func:`replace_all_batch_norm_modules_` took the statistics from.

    Args:
        root: The module, or a copy of it. Not mutated.

    Returns:
        Names as in ``root.named_modules()``, in its order; ``""`` is ``root`` itself.

    Example::

        >>> import torch
        >>> from fcall.batch_norm import replace_all_batch_norm_modules_, replaced_batch_norms
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> replaced_batch_norms(model)
        []
        >>> replaced_batch_norms(replace_all_batch_norm_modules_(model))
        ['1']
    """
    return [name for name, module in root.named_modules() if getattr(module, _MARK, False)]
