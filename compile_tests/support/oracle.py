"""The reference for every result: a deep copy of the module with the values, float64, eager."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def state_of(module: nn.Module, *, seed: int | None = None) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers; with ``seed``, floating ones are random."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    state = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        value = tensor.detach().clone()
        if generator is not None and value.is_floating_point():
            # Positive, since among the buffers are variances.
            value = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.1
        state[name] = value
    return state


def loaded(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Return a deep copy of ``module`` in float64 that owns ``values``."""
    twin = copy.deepcopy(module).double()
    own = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return twin


def in_float64(nest: Any) -> Any:
    """Return a copy of a nest of tensors, floating ones in float64, keeping ``requires_grad``."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float64 if leaf.is_floating_point() else leaf.dtype
        return leaf.detach().to(dtype).clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(convert, nest)


def assert_close(actual: Any, expected: Any, *, dtype: torch.dtype | None = None) -> None:
    """Compare nests of tensors with the tolerances of the actual tensors' dtype."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec
    for a, e in zip(actual_leaves, expected_leaves):
        if isinstance(a, Tensor):
            tolerance = TOLERANCES.get(dtype or a.dtype, {"rtol": 0, "atol": 0})
            torch.testing.assert_close(a, e, check_dtype=False, **tolerance)
        else:
            assert a == e


def fingerprint(module: nn.Module) -> list[Any]:
    """Return all that a call must leave as it was: identities, order, values and versions."""
    marks: list[Any] = []
    for path, owner in module.named_modules(remove_duplicate=False):
        for store in ("_parameters", "_buffers", "_modules"):
            for key, entry in getattr(owner, store).items():
                mark = [path, store, key, id(entry)]
                if isinstance(entry, Tensor) and not entry.is_meta:
                    mark += [entry._version, entry.detach().clone().flatten().tolist()]
                marks.append(mark)
        marks.append([path, sorted(owner.__dict__), owner.training, type(owner)])
        if isinstance(owner, nn.RNNBase):
            marks.append([id(weight) for weight in owner._flat_weights])
    return marks


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Check that the block leaves ``module`` as it was, also when the block raises."""
    before = fingerprint(module)
    try:
        yield
    finally:
        assert fingerprint(module) == before, "the module was changed"
