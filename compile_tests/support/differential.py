"""A random functional call of a random module, beside the same call of an oracle.

The oracle is a deep copy of the module that owns the values, put there with plain ``setattr``.
Compared are the output or the exception, all gradients, what is written back, and the state of the
module afterwards: the substituted tensors as they were, its own as after a plain call.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fcall
from compile_tests.support.random_modules import (
    WIDTH,
    Calls,
    Inner,
    Mean,
    Twice,
    random_module,
)
from compile_tests.support.slots import Slot, set_tensor, slots_of
from compile_tests.support.ways import TRANSFORMS, WAYS, Run, assert_close, autograd, compiled


class Call(NamedTuple):
    """What is given to one call."""

    values: dict[str, Tensor]
    x: Tensor
    tie_weights: bool
    strict: bool
    fails: bool
    """Whether a hook raises at the end of one of the submodules."""


class Failed(Exception):
    """Raised by a hook."""


def check(rng: Random, run: Run | None = None, *, faults: bool = True) -> None:
    """Compare one or two calls of a random module, by ``run`` or a random way to call."""
    module = random_module(rng)
    if run is compiled and known_to_fail(module):
        return
    for _ in range(rng.choice([1, 2])):
        call = random_call(rng, module, faults=faults)
        way = run or rng.choice(WAYS)
        check_call(rng, module, call, way)
        if way in TRANSFORMS:
            break  # the module's own buffers may be of the transform, as after a plain call


def known_to_fail(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` itself has wrong gradients or buffers."""
    places = list(module.named_modules(remove_duplicate=False))
    twice = [part for _, owner in places if type(owner) is Twice for part in owner.modules()]
    means = [id(part) for _, part in places if type(part) is Mean]
    norms = [part for _, part in places if type(part) is nn.BatchNorm1d]
    return (
        any(type(part) is Mean for part in twice)
        or len(set(means)) < len(means)
        or any(norm.running_mean is norm.running_var for norm in norms)
    )


def random_call(rng: Random, module: nn.Module, *, faults: bool) -> Call:
    """Draw names, values for them, and the rest of a call."""
    slots = slots_of(module)
    tie_weights = rng.random() < 0.7
    names = list(slots)
    registered = [name for name in names if slots[name].store in ("_parameters", "_buffers")]
    strict = rng.random() < 0.2
    if strict:
        chosen = [name for name in registered if slots[name].tensor is not None]
    else:
        chosen = rng.sample(
            names, rng.choice([0, 1, len(names) // 2, len(names)][: len(names) + 1])
        )
    of_group: dict[Any, Tensor] = {}
    values = {}
    for name in chosen:
        group = _group(slots[name], tie_weights)
        if group not in of_group:
            of_group[group] = _value(slots[name], rng)
        values[name] = of_group[group]
    # Not symmetric: norms of what is would have zeros where others have rounding errors.
    x = torch.linspace(0, 9, 3 * WIDTH, dtype=torch.float64).sin().view(3, WIDTH)
    return Call(values, x, tie_weights, strict, faults and rng.random() < 0.15)


def _group(slot: Slot, tie_weights: bool) -> Any:
    """Return what tells apart the values that may differ."""
    registered = slot.store in ("_parameters", "_buffers") and slot.tensor is not None
    return id(slot.tensor) if tie_weights and registered else slot


def _value(slot: Slot, rng: Random) -> Tensor:
    like = slot.tensor if slot.tensor is not None else torch.zeros(WIDTH, dtype=torch.float64)
    if not like.is_floating_point():
        return like.clone()
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    # Positive, since among the buffers are variances.
    value = torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.1
    return value.requires_grad_(slot.store != "_buffers" and rng.random() < 0.9)


def check_call(rng: Random, module: nn.Module, call: Call, run: Run) -> None:
    """Compare one call with the oracle's."""
    twin = copy.deepcopy(module)
    for inner in twin.modules():
        if isinstance(inner, Inner):
            inner.functional = False
    handles = []
    if call.fails:
        number = rng.randrange(len(list(module.modules())))
        parts = [list(m.modules())[number % len(list(m.modules()))] for m in (module, twin)]
        handles = [part.register_forward_hook(_fail) for part in parts]
    slots, twin_slots = slots_of(module), slots_of(twin)
    written = _written(slots, call)
    leaves = {id(value): _leaf(value, slots[name]) for name, value in call.values.items()}
    for name, giver in written.items():
        if twin_slots[name].store != "parametrized":
            set_tensor(twin_slots[name], leaves[id(call.values[giver])])
    for slot, giver in {twin_slots[n]: g for n, g in written.items()}.items():
        if slot.store == "parametrized":
            set_tensor(slot, leaves[id(call.values[giver])])
    rest = [slot for name, slot in slots.items() if name not in written]
    own = {id(slot.tensor) for slot in rest if slot.store != "parametrized"}
    before = {name: _mark(slots[name], own) for name in written}
    orders = _key_orders(slots, written)
    kept = [name for name in slots if name not in written and slots[name].store == "_parameters"]
    kept = [name for name in kept if slots[name].tensor is not None]

    given = dict(call.values)
    x, twin_x = (call.x.clone().requires_grad_() for _ in "12")
    out = _outcome(lambda: run(module, given, x, call.tie_weights, call.strict))
    expected = _outcome(lambda: twin(twin_x))
    for handle in handles:
        handle.remove()
    refused = out == REFUSED and run in TRANSFORMS and writes_in_place(module)
    if not refused:
        assert_close(out, expected)
    if isinstance(out, Tensor):
        ours = [x, *call.values.values(), *(slots[name].tensor for name in kept)]
        theirs = [twin_x, *(leaves[id(v)] for v in call.values.values())]
        theirs += [twin_slots[name].tensor for name in kept]
        pairs = (out, ours), (expected, theirs)
        assert_close(*[_outcome(lambda pair=pair: _gradients(*pair)) for pair in pairs])
    for name in written:
        assert _mark(slots[name], own) == before[name], f"{name!r} was changed in the module"
    assert _key_orders(slots, written) == orders, "the order of names was changed"
    for owner in module.modules():
        if isinstance(owner, nn.RNNBase):
            own = [getattr(owner, name) for name in owner._flat_weights_names]
            assert list(map(id, owner._flat_weights)) == list(map(id, own))
    if run in TRANSFORMS and not isinstance(out, Tensor):
        return  # half way, and what was written to the dicts until then is lost with the transform
    for name, slot in slots.items():
        if name in given:
            assert_close(given[name].detach(), twin_slots[name].tensor.detach())
        elif name not in written and slot.store != "parametrized" and slot.tensor is not None:
            assert_close(slot.tensor.detach(), twin_slots[name].tensor.detach())
    counts = [[m.calls for m in part.modules() if isinstance(m, Calls)] for part in (module, twin)]
    assert counts[0] == counts[1]


def _written(slots: dict[str, Slot], call: Call) -> dict[str, str]:
    """Map each name whose tensor is substituted to the given name that its value comes from."""
    givers = {}
    for name in call.values:
        givers.setdefault(_group(slots[name], call.tie_weights), name)
    groups = {name: _group(slot, call.tie_weights) for name, slot in slots.items()}
    return {name: givers[group] for name, group in groups.items() if group in givers}


def _leaf(value: Tensor, slot: Slot) -> Tensor:
    copied = value.detach().clone().requires_grad_(value.requires_grad)
    return nn.Parameter(copied, value.requires_grad) if slot.store == "_parameters" else copied


def _key_orders(slots: dict[str, Slot], written: Iterable[str]) -> list[list[str]]:
    """Return the names of what a call writes to, in the order in which each dict has them.

    What the module itself deletes and registers again is at the end, as after a plain call.
    """
    registered = [slots[n] for n in written if slots[n].store in ("_parameters", "_buffers")]
    places = {(id(slot.owner), slot.store, slot.key) for slot in registered}
    return [
        [key for key in getattr(s.owner, s.store) if (id(s.owner), s.store, key) in places]
        for s in registered
    ]


def _mark(slot: Slot, own: set[int]) -> Any:
    """Return what must stay; of a tensor that is in a slot without a value, too, its identity."""
    if slot.store == "parametrized":
        return id(slot.owner.parametrizations[slot.key])  # type: ignore[index,union-attr]
    tensor = slot.tensor
    if tensor is None or id(tensor) in own:
        return id(tensor)
    return id(tensor), tensor._version, str(tensor.tolist())  # a NaN is as it was, too


def _fail(*_: Any) -> None:
    raise Failed


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap
            return call()
    except Failed:
        return "failed"
    except fcall.errors.InPlaceUnderTransformError:
        return REFUSED
    except RuntimeError as error:
        for words, what in KNOWN.items():
            if words in str(error):
                return what
        raise


REFUSED = "refused"
KNOWN = {
    "modified by an inplace operation": "no gradient",
    "the fallback path doesn't work on out=": REFUSED,
}
"""What torch says, and what it means."""


def writes_in_place(module: nn.Module) -> bool:
    """Whether there is a write for transforms to refuse."""
    kinds = (Mean, nn.BatchNorm1d, parametrizations._SpectralNorm)
    return any(isinstance(part, kinds) for part in module.modules())


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a function of ``out``; zeros for what it does not depend on."""
    taken = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(autograd(out, taken) if taken else ())
    return [next(gradients) if t.requires_grad else torch.zeros(()) for t in inputs]
