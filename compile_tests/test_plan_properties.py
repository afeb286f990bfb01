"""Random modules, random changes, calls in between: each does what the names say just then."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compile_tests.support.oracle import unchanged
from fcall import functional_call

POOL = [torch.zeros(()) for _ in range(3)]
"""The values that are given; few, so that two names often get the same one."""

Slot = tuple[nn.Module, str, str]
"""A submodule, one of its dicts, and a key in it."""


class Root(nn.Module):
    """Two levels of submodules, all with parameters and buffers. Returns its tensors by name."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        for name in "ab":
            middle = nn.Module()
            self.add_module(name, middle)
            for leaf in "cd":
                middle.add_module(leaf, nn.Module())
        for owner in self.modules():
            for key in rng.sample("pqr", 2):
                owner.register_parameter(key, nn.Parameter(torch.zeros(())))
            owner.register_buffer("s", torch.zeros(()))

    def forward(self) -> dict[str, int]:
        return {name: id(tensor) for name, _, tensor in entries_of(self)}


def entries_of(module: nn.Module) -> Iterator[tuple[str, Slot, Tensor]]:
    """Yield the name, the slot and the tensor of all that is registered, by each of its names."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for store in ("_parameters", "_buffers"):
            for key, tensor in getattr(owner, store).items():
                if tensor is not None:
                    yield f"{path}.{key}".strip("."), (owner, store, key), tensor


def change(module: Root, rng: random.Random) -> None:
    """Change how the module is built, in one way or another."""
    slots = [slot for _, slot, _ in entries_of(module)]
    owner, store, key = rng.choice(slots)
    entries = getattr(owner, store)
    middles = [module.a, module.b]
    one, other = rng.choice(middles), rng.choice(middles)
    match rng.randrange(10):
        case 0:  # tie
            from_owner, from_store, from_key = rng.choice([s for s in slots if s[1] == store])
            entries[key] = getattr(from_owner, from_store)[from_key]
        case 1:  # replace
            fresh = torch.zeros(())
            entries[key] = nn.Parameter(fresh) if store == "_parameters" else fresh
        case 2:
            del entries[key]
        case 3:
            entries[key] = None
        case 4:
            owner.register_buffer(f"t{rng.randrange(3)}", torch.zeros(()))
        case 5:  # share a leaf
            setattr(one, rng.choice("cd"), other.get_submodule(rng.choice("cd")))
        case 6:  # rename
            entries.setdefault(rng.choice("pqrt"), entries.pop(key))
        case 7:  # move
            target = rng.choice(list(module.modules()))
            if all(key not in entries for entries in (target._parameters, target._buffers)):
                getattr(target, rng.choice(["_parameters", "_buffers"]))[key] = entries.pop(key)
        case 8:
            module.a, module.b = module.b, module.a
        case _:  # a leaf of its own
            leaf = nn.Module()
            leaf.register_parameter("p", nn.Parameter(torch.zeros(())))
            setattr(one, rng.choice("cd"), leaf)


def expected_of(
    module: Root, values: dict[str, Tensor], tie_weights: bool, strict: bool
) -> dict[str, int] | type[Exception]:
    """Say what a call returns or raises, from the definition of ties and shared slots."""
    entries = list(entries_of(module))

    def group(slot: Slot, tensor: Tensor) -> Any:
        owner, store, key = slot
        return id(tensor) if tie_weights else (id(owner), store, key)

    found: dict[Any, set[int]] = {}
    for name, slot, tensor in entries:
        if name in values:
            found.setdefault(group(slot, tensor), set()).add(id(values[name]))
    if strict and any(group(slot, tensor) not in found for _, slot, tensor in entries):
        return RuntimeError
    if any(len(several) > 1 for several in found.values()):
        return ValueError
    return {
        name: next(iter(found.get(group(slot, tensor), {id(tensor)})))
        for name, slot, tensor in entries
    }


STEPS = st.lists(st.sampled_from(["change", "call"]), min_size=5, max_size=30)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32), st.lists(st.sampled_from(["change", "call"]), min_size=5, max_size=30)
)
def test_calls_between_changes(seed: int, steps: list[str]) -> None:
    rng = random.Random(seed)
    module = Root(rng)
    names_before: list[str] = []
    for step in [*steps, "call"]:
        if step == "change":
            change(module, rng)
            continue
        names = [name for name, _, _ in entries_of(module)]
        if set(names_before) <= set(names) and rng.random() < 0.6:
            names = names_before  # the same call as before the changes
        else:
            names = rng.sample(names, rng.choice([0, 1, 2, len(names) // 2, len(names)]))
        names_before = names
        pool = POOL[: rng.choice([1, 1, 2, 3])]
        values = {name: rng.choice(pool) for name in names}
        options = {"tie_weights": rng.random() < 0.6, "strict": rng.random() < 0.2}
        expected = expected_of(module, values, **options)
        given_values = dict(values)
        with unchanged(module):
            if isinstance(expected, dict):
                assert functional_call(module, given_values, **options) == expected
            else:
                with pytest.raises(expected):
                    functional_call(module, given_values, **options)
        assert given_values == values
