"""``Ensemble``: models that differ in their values only, as one module that calls all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcall import _torch, errors
from fcall.call import functional_call
from fcall.meta import base_copy, copy_with, like, registered_tensors
from fcall.stacking import stack_module_state

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Calls models of one architecture all at once, with their parameters and buffers stacked.

    The same as ``torch.stack([model(*args, **kwargs) for model in models])``, by one ``torch.vmap``
    over :func:`fcall.functional_call`. Its parameters are the stacked ones, new and independent of
    the models', under the models' names after ``"members."``: ``"members.l1.weight"`` is
    the stack of all ``"l1.weight"``. So optimizers, ``to``, ``state_dict`` and the like work as on
    any module, and ties stay ties. The models are not kept.

    Args:
        models: The models, at least one; alike as for :func:`fcall.stack_module_state`. Not
            mutated. Attributes that are neither parameters nor buffers are those of the first.
        in_dims: ``None`` if all positional arguments are for all members. Otherwise as in
            ``torch.vmap``: the dimension of the arguments along which each member has its own, or a
            tuple with that dimension, or ``None``, for each argument. Keyword arguments are always
            for all.
        randomness: ``"different"`` or ``"same"`` random numbers (dropout) for the members, or
            ``"error"``.
        chunk_size: How many members to call at once, to save memory; ``None`` for all.

    Calling it returns what the models return, in nests of tensors, each with a new first dimension,
    ``len(ensemble)`` long. Mutated, as by the models themselves: their buffers (the statistics of
    batch norm), in place, or replaced where the model reassigns them.

    Raises:
        LazyModuleError: a model has parameters that are not made yet (a ``RuntimeError``).
        NoModelsError: there are no models (a ``RuntimeError``).
        UnlikeModelsError: the models differ in more than values (a ``RuntimeError``); also in the
            values of tensors that are plain attributes.

    Example::

        >>> import fcall, torch
        >>> ensemble = fcall.Ensemble([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> ensemble(torch.ones(5, 3)).shape
        torch.Size([4, 5, 2])
        >>> {name: tuple(p.shape) for name, p in ensemble.named_parameters()}
        {'members.weight': (4, 2, 3), 'members.bias': (4, 2)}
        >>> [type(member).__name__ for member in ensemble.unstack()]
        ['Linear', 'Linear', 'Linear', 'Linear']

    The semantics are those of :func:`torch.vmap` with ``out_dims=0``.
    """

    _uncalled: nn.Module
    """What :meth:`unstack` copies: without what calls leave in the plain attributes of the base."""

    def __init__(
        self,
        models: Sequence[nn.Module] | nn.ModuleList,
        *,
        in_dims: int | tuple[Any, ...] | None = None,
        randomness: str = "different",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        params, buffers = stack_module_state(models)
        _check_other_tensors(models)
        self.in_dims = in_dims
        self.randomness = randomness
        self.chunk_size = chunk_size
        self._length = len(models)
        self._names = list(params), list(buffers)
        base = base_copy(models[0])
        stacks = {}
        for name, parameter in base.named_parameters():
            stacks[id(parameter)] = like(parameter, params[name].detach(), parameter.requires_grad)
        for name, buffer in base.named_buffers():
            stacks[id(buffer)] = buffers[name]
        self.members = _part_of(base, stacks, {})
        self.training = base.training
        object.__setattr__(self, "_uncalled", base_copy(models[0]))  # not to be registered

    def __len__(self) -> int:
        return self._length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call all members; see the class."""
        base = self.members._fcall_twin
        params, buffers = self._state()

        def call_member(
            params: dict[str, Tensor], buffers: dict[str, Tensor], args: tuple[Any, ...]
        ) -> tuple[Any, dict[str, Tensor]]:
            given = {**params, **buffers}
            state = dict(given)
            out = functional_call(base, state, args, kwargs)
            return out, {name: state[name] for name in given if state[name] is not given[name]}

        call = torch.vmap(
            call_member,
            in_dims=(0, 0, self.in_dims),
            randomness=self.randomness,
            chunk_size=self.chunk_size,
        )
        out, reassigned = call(params, buffers, args)
        for name, value in reassigned.items():
            path, _, key = name.rpartition(".")
            # Contiguous, since what does not differ between members is only expanded.
            setattr(self.members.get_submodule(path), key, value.contiguous())
        return out

    def unstack(self) -> list[nn.Module]:
        """Return the members as modules of their own, of the models' class.

        Returns:
            As many modules as there are members. Their parameters and buffers are copies, with the
            ties, modes and ``requires_grad`` that those of the ensemble have now; all the rest is a
            deep copy of what the first model had.

        Example::

            >>> import fcall, torch
            >>> ensemble = fcall.Ensemble([torch.nn.Linear(3, 2) for _ in range(4)])
            >>> member = ensemble.unstack()[1]
            >>> torch.equal(member.weight, ensemble.members.weight[1])
            True
        """
        base = self._uncalled
        for part, called in zip(base.modules(), self.members._fcall_twin.modules()):
            part.training = called.training
        params, buffers = self._state()
        pairs: list[tuple[Tensor, Tensor]] = []
        pairs += [(tensor, params[name]) for name, tensor in base.named_parameters()]
        pairs += [(tensor, buffers[name]) for name, tensor in base.named_buffers()]
        members = []
        for i in range(len(self)):
            values = {
                id(tensor): like(tensor, stack[i].detach().clone(), stack.requires_grad)
                for tensor, stack in pairs
            }
            members.append(copy_with(base, values))
        return members

    def extra_repr(self) -> str:
        return f"{len(self)} members"

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the stacked parameters and buffers, each under the first of its names."""
        params = dict(self.members.named_parameters(remove_duplicate=False))
        buffers = dict(self.members.named_buffers(remove_duplicate=False))
        of_params, of_buffers = self._names
        return {n: params[n] for n in of_params}, {n: buffers[n] for n in of_buffers}


class _Part(nn.Module):
    """Holds the stacked tensors of one submodule; the modules of an ensemble mirror the models'."""

    _fcall_twin: nn.Module  # a name that no submodule has
    """The submodule of the base, which is what is called. Its tensors are on meta."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        # Not registered: its tensors, all on meta, are none of the ensemble's.
        object.__setattr__(self, "_fcall_twin", twin)
        self.training = twin.training

    def train(self, mode: bool = True) -> _Part:
        """Set the mode as the submodule itself does, which may keep a part of it in eval mode."""
        self._fcall_twin.train(mode)
        for part in self.modules():
            part.training = part._fcall_twin.training  # type: ignore[union-attr]
        return self

    def _get_name(self) -> str:
        return type(self._fcall_twin).__name__

    def extra_repr(self) -> str:
        return self._fcall_twin.extra_repr()


def _part_of(twin: nn.Module, stacks: dict[int, Tensor], made: dict[int, _Part]) -> _Part:
    """Return the part for ``twin``; what is one submodule or tensor there is one here."""
    if id(twin) in made:
        return made[id(twin)]
    part = made[id(twin)] = _Part(twin)
    for key, parameter in twin._parameters.items():
        stack = None if parameter is None else stacks[id(parameter)]
        part.register_parameter(key, stack)  # type: ignore[arg-type]
    for key, buffer in twin._buffers.items():
        stack = None if buffer is None else stacks[id(buffer)]
        persistent = key not in twin._non_persistent_buffers_set
        part.register_buffer(key, stack, persistent=persistent)
    for key, child in twin._modules.items():
        part.add_module(key, None if child is None else _part_of(child, stacks, made))
    return part


def _check_other_tensors(models: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Refuse models whose plain attributes hold different tensors: only the first's are used."""
    expected = dict(_other_tensors(models[0]))
    for index, model in enumerate(models[1:], 1):
        found = dict(_other_tensors(model))
        for name in (*found, *expected):
            if name not in found or name not in expected or not _equal(found[name], expected[name]):
                what = f"the tensor in the plain attribute {name!r} (no parameter or buffer)"
                errors.fail(errors.UnlikeModelsError, index, what, "another", "one")


def _other_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in plain attributes, and nests of them, but for those on a tape.

    The latter are computed from others, and are so again in each call.
    """
    registered = {id(tensor) for tensor in registered_tensors(model)}
    for path, part in model.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            for number, leaf in enumerate(_torch.pytree.tree_leaves(value)):
                if isinstance(leaf, Tensor) and id(leaf) not in registered and leaf.is_leaf:
                    name = f"{path}.{key}" if path else key
                    yield f"{name}[{number}]" if leaf is not value else name, leaf


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    same = (left == right) | ((left != left) & (right != right))  # NaN, too
    return left.is_meta or bool(same.all())
