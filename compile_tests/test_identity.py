"""Identities of many objects at once: the same as their ids, one by one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from fcall import identity
from fcall.identity import identities

ONE, OTHER = torch.ones(1), torch.ones(1)

TUPLES: dict[str, tuple[Any, ...]] = {
    "none": (),
    "one": (ONE,),
    "all kinds": (None, 1, "a", [], {}, ONE, OTHER, torch.nn.Parameter(ONE), object),
    "one twice": (ONE, OTHER, ONE),
    "many": tuple(object() for _ in range(1000)),
    "from an iterator": tuple(iter([ONE, OTHER])),
    "a part": (ONE, OTHER, None, ONE)[1:3],
}


@pytest.mark.parametrize("items", TUPLES.values(), ids=TUPLES.keys())
def test_they_are_the_ids(items: tuple[Any, ...]) -> None:
    assert identities(items) == b"".join(id(item).to_bytes(8, sys.byteorder) for item in items)
    assert identity._one_by_one(items) == identities(items)


def test_equal_objects_are_told_apart() -> None:
    assert identities((ONE, OTHER)) == identities((ONE, OTHER))
    assert identities((ONE, OTHER)) != identities((ONE, ONE))
    assert identities((ONE, OTHER)) != identities((OTHER, ONE))
    assert identities((ONE,)) != identities((ONE, ONE))


def test_memory_is_what_is_read() -> None:
    """Else calls are right, but slower."""
    assert identity._tuples_hold_ids()
