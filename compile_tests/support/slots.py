"""The places in a module that hold tensors, found by plain means: what the fuzzer's oracle uses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Slot(NamedTuple):
    """A place for one tensor."""

    owner: nn.Module
    store: str
    """``"_parameters"``, ``"_buffers"``, ``"plain"`` (an attribute), or ``"parametrized"``."""
    key: str

    @property
    def tensor(self) -> Any:
        """What is there: a tensor or None."""
        return getattr(self.owner, self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((id(self.owner), self.store, self.key))


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Return all that can be substituted, by each of its names."""
    found = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        slots = [Slot(owner, s, k) for s in ("_parameters", "_buffers") for k in getattr(owner, s)]
        slots += [Slot(owner, "plain", k) for k, v in vars(owner).items() if isinstance(v, Tensor)]
        if parametrize.is_parametrized(owner):
            slots += [Slot(owner, "parametrized", k) for k in owner.parametrizations]  # type: ignore[union-attr]
        found.update({f"{path}.{slot.key}".lstrip("."): slot for slot in slots})
    return found


def set_tensor(slot: Slot, value: Any) -> None:
    """Put ``value`` there for good; a parametrization is taken off."""
    owner = slot.owner
    if slot.store == "parametrized":
        # remove_parametrizations would take the property from the class, which copies share.
        owner.__class__ = type(owner).__bases__[0]
        del owner.parametrizations
        object.__setattr__(owner, slot.key, value)  # and no parameter, that code could find as one
    else:
        setattr(owner, slot.key, value)
