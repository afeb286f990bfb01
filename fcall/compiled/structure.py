"""How a module is built, and a check that it has stayed so.

Dynamo guards what a trace read of a module, but for two things: its hooks (torch skips guards on
them, to save time), and, in the frames of :mod:`fcall.compiled.frames`, which slots a name stands
for. Both depend on nothing but dicts of the submodules: those of parameters, buffers, submodules
and hooks. A dict has a version that changes whenever it is written to. So a call compares versions,
at some 20 ns a dict, and looks at the contents only after one has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fcall._torch import compiling
from fcall.passes import STORES

__all__ = ["Hooks", "Watch", "hooks_of", "same_hooks"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Hooks = list[tuple[int, str, Any]]
"""The hooks that calls of a module run: the number of the submodule, the dict, the hook."""


def hooks_of(module: nn.Module) -> Hooks:
    """Return all hooks that calls of ``module`` run, with where they are."""
    return [
        (number, store, hook)
        for number, owner in enumerate(module.modules())
        for store in HOOKS
        for hook in getattr(owner, store).values()
    ]


def same_hooks(before: Hooks, after: Hooks) -> bool:
    """Whether two results of :func:`hooks_of` are the same, hook by hook."""
    return len(before) == len(after) and all(
        a[:2] == b[:2] and a[2] is b[2] for a, b in zip(before, after)
    )


class Watch:
    """Tells whether a module is built as it was when the watch was made."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = tuple(vars(owner) for owner in module.modules())
        self._dicts = self._dicts_now()
        self._unwritten = self._take_versions()
        self._contents = self._contents_now()
        # So that ids are not used again. Of tensors only the pattern of equal ids matters.
        self._alive = [list(d.values()) for d in self._dicts if d and not _holds_tensors(d)]

    def unchanged(self) -> bool:
        """Whether nothing was written to the dicts, or all in them is again as it was."""
        dicts, owners = self._unwritten
        if dicts(self._dicts) and owners(self._owners):
            return True
        versions = self._take_versions()  # before the contents: other threads may write
        if any(now is not before for now, before in zip(self._dicts_now(), self._dicts)):
            return False
        if self._contents_now() != self._contents:
            return False
        self._unwritten = versions
        return True

    def _take_versions(self) -> tuple[Callable[[Any], bool], Callable[[Any], bool]]:
        check = compiling.compiled_calls().version_check
        return check(self._dicts), check(self._owners)

    def _dicts_now(self) -> tuple[Any, ...]:
        return tuple([owner.get(name) for owner in self._owners for name in (*STORES, *HOOKS)])

    def _contents_now(self) -> list[Any]:
        return [(*entries, *map(id, entries.values())) for entries in self._dicts]


def _holds_tensors(entries: dict[str, Any]) -> bool:
    return any(isinstance(entry, Tensor) for entry in entries.values())
