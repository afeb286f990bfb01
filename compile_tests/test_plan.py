"""The plan kept from call to call: used again while the module stays, never when it changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compile_tests.support.models import Symmetric
from compile_tests.support.oracle import assert_close, unchanged
from compile_tests.support.parity import TORCH
from fcall import functional_call, plan


@pytest.fixture
def binds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A list that grows by the names of each call that resolves them anew."""
    calls: list[tuple[str, ...]] = []
    bind = plan.bind

    def counted(module: nn.Module, names: Any, **options: Any) -> Any:
        calls.append(tuple(names))
        return bind(module, names, **options)

    monkeypatch.setattr(plan, "bind", counted)
    return calls


class Pair(nn.Module):
    """``(batch, 2) -> (batch, 2)``: two layers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.register_buffer("shift", torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.shift


ALL = ["a.weight", "a.bias", "b.weight", "b.bias", "shift"]
SHAPES = {"a.weight": (2, 2), "b.weight": (2, 2), "a.parametrizations.weight.original": (2, 2)}


def values_of(names: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(SHAPES.get(name, (2,)), generator=generator) for name in names}


def _set(path: str, make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    """Return a change that assigns what ``make`` makes of the module."""
    owner_path, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(owner_path), name, make(module))


def _delete(path: str) -> Callable[[nn.Module], None]:
    owner_path, _, name = path.rpartition(".")
    return lambda module: delattr(module.get_submodule(owner_path), name)


def _swap(module: nn.Module) -> None:
    module.a, module.b = module.b, module.a


def _rename(module: nn.Module) -> None:
    module.c = module.a
    del module.a


def _rename_last(module: nn.Module) -> None:
    module.c = module._modules.pop("b")


def _rename_bias(module: nn.Module) -> None:
    module.b.register_parameter("offset", module.b._parameters.pop("bias"))


def _to_buffer(module: nn.Module) -> None:
    bias = module.a.bias.detach()
    del module.a.bias
    module.a.register_buffer("bias", bias)


def _move(module: nn.Module) -> None:
    module.b.register_parameter("extra", module.a._parameters.pop("extra"))


def _with_empty_submodules(module: nn.Module) -> None:
    module.c, module.d = nn.Module(), nn.Module()
    module.c.register_parameter("extra", nn.Parameter(torch.rand(2)))


def _to_buffer_as_it_is(module: nn.Module) -> None:
    module.c._buffers["extra"] = module.c._parameters.pop("extra")


def _to_empty_submodule(module: nn.Module) -> None:
    module.d._parameters["extra"] = module.c._parameters.pop("extra")


def _parametrize(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module.a, "weight", Symmetric())
    return module


def _plain(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module.a, "weight")


def _assign_state(module: nn.Module) -> None:
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def _made(*changes: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """Return what makes a Pair and changes it."""

    def make() -> nn.Module:
        module = Pair()
        for change in changes:
            change(module)
        return module

    return make


def formula(module: nn.Module, values: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
    """What a Pair computes that was given all values."""
    hidden = nn.functional.linear(x, values["a.weight"], values["a.bias"])
    return nn.functional.linear(hidden, values["b.weight"], values["b.bias"]) + values["shift"]


def refused(module: nn.Module, values: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
    raise RuntimeError("a mix of meta and real tensors")


def by_torch(module: nn.Module, values: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
    return TORCH(module, values, x, **options)


class Change(NamedTuple):
    change: Callable[[nn.Module], Any]
    names: list[str] = ALL
    make: Callable[[], nn.Module] = Pair
    expected: Callable[..., Tensor] = by_torch
    noticed: bool = True
    """Whether the names have to be resolved anew."""


tie = _set("b.weight", lambda m: m.a.weight)
untie = _set("b.weight", lambda m: nn.Parameter(m.b.weight.detach().clone()))
add_extra = _set("a.extra", lambda m: nn.Parameter(torch.rand(2)))
no_bias = _set("a.bias", lambda m: None)

CHANGES = {
    "submodule replaced": Change(_set("a", lambda m: nn.Linear(2, 2))),
    "submodule replaced by an equal one": Change(_set("a", lambda m: copy.deepcopy(m.a))),
    "submodule replaced by one without bias": Change(_set("a", lambda m: nn.Linear(2, 2, False))),
    "submodule replaced by None": Change(_set("a", lambda m: None)),
    "submodule replaced by the other": Change(_set("b", lambda m: m.a)),
    "submodule shared": Change(_set("b", lambda m: m.a), ["a.weight"]),
    "submodule not shared any more": Change(
        _set("b", lambda m: nn.Linear(2, 2)), ["a.weight"], _made(_set("b", lambda m: m.a))
    ),
    "submodule added": Change(_set("c", lambda m: nn.Linear(2, 2))),
    "submodule deleted": Change(_delete("b")),
    "submodules swapped": Change(_swap, expected=formula),
    "submodule renamed": Change(_rename),
    "submodule renamed in its place": Change(_rename_last),
    "parameter added": Change(add_extra),
    "parameter renamed in its place": Change(_rename_bias),
    "parameter deleted": Change(_delete("a.bias")),
    "parameter set to None": Change(no_bias),
    "parameter set from None": Change(
        _set("a.bias", lambda m: nn.Parameter(torch.rand(2))), make=_made(no_bias)
    ),
    "parameter replaced": Change(_set("a.weight", lambda m: nn.Parameter(torch.rand(2, 2)))),
    "parameter made a buffer": Change(_to_buffer),
    "parameter moved to another submodule": Change(_move, make=_made(add_extra)),
    "only parameter moved to an empty submodule": Change(
        _to_empty_submodule, ["c.extra"], _made(_with_empty_submodules)
    ),
    "only parameter made a buffer as it is": Change(
        _to_buffer_as_it_is, ["c.extra"], _made(_with_empty_submodules)
    ),
    "buffer added": Change(lambda m: m.register_buffer("extra", torch.rand(2))),
    "buffer replaced": Change(_set("shift", lambda m: torch.rand(2))),
    "tied": Change(tie),
    "tied, one name given": Change(tie, ["a.weight"]),
    "tied, the other name given": Change(tie, ["b.weight", "a.bias"]),
    "untied": Change(untie, ["a.weight"], _made(tie)),
    "tied to another one": Change(
        lambda m: (untie(m), _set("b.bias", lambda m: m.a.bias)(m)),
        ["a.weight", "a.bias"],
        _made(tie),
    ),
    "moved to meta": Change(lambda m: m.to("meta"), expected=formula, noticed=False),
    "moved to meta and back": Change(lambda m: m.to("meta").to_empty(device="cpu"), noticed=False),
    "moved to meta, some given": Change(
        lambda m: m.to("meta"), ["a.weight"], expected=refused, noticed=False
    ),
    "dtype": Change(lambda m: m.double(), noticed=False),
    "state assigned": Change(_assign_state),
    "parametrized, plain name": Change(_parametrize, expected=formula),
    "parametrized, original": Change(
        _parametrize, ["a.parametrizations.weight.original"], _made(_parametrize, _plain)
    ),
    "not parametrized any more, plain name": Change(
        _plain, make=_made(_parametrize), expected=formula
    ),
    "not parametrized any more, original": Change(
        _plain, ["a.parametrizations.weight.original"], _made(_parametrize)
    ),
}


def outcome(fn: Callable[[], Any]) -> Any:
    """Return what ``fn`` returns, or the builtin type of what it raises."""
    try:
        return fn()
    except Exception as error:  # noqa: BLE001
        builtins = [cls for cls in type(error).__mro__ if cls.__module__ == "builtins"]
        return builtins[0]


@pytest.mark.parametrize(
    ("case", "strict"),
    [
        pytest.param(case, strict, id=f"{name}, strict" if strict else name)
        for name, case in CHANGES.items()
        for strict in ([False, True] if case.names is ALL else [False])
    ],
)
def test_a_change_is_noticed(case: Change, strict: bool, binds: list[Any]) -> None:
    torch.manual_seed(0)
    module, values, x = case.make(), values_of(case.names), torch.rand(3, 2)

    def call() -> Any:
        return outcome(lambda: functional_call(module, dict(values), x, strict=strict))

    for _ in range(2):
        with unchanged(module):
            before = call()
    if isinstance(before, Tensor):
        assert len(binds) == 1, "an unchanged module uses its plan again"

    case.change(module)
    binds.clear()
    twin = copy.deepcopy(module)
    expected = by_torch if strict else case.expected  # a strict call never needs what fcall adds
    wanted = outcome(lambda: expected(twin, dict(values), x, strict=strict))
    with unchanged(module):
        after = call()
    if isinstance(wanted, Tensor):
        assert_close(after, wanted)
    else:
        assert after is wanted
    if case.noticed and isinstance(before, Tensor):
        assert len(binds) == 1


def test_other_names_and_options_have_other_plans(binds: list[Any]) -> None:
    module, x, values = Pair(), torch.rand(3, 2), values_of(ALL)
    calls: list[tuple[list[str], dict[str, bool]]] = [
        (ALL, {}),
        (ALL[:2], {}),
        (ALL[::-1], {}),
        (ALL, {"tie_weights": False}),
        (ALL, {"strict": True}),
    ]
    for _ in range(2):
        for names, options in calls:
            out = functional_call(module, {n: values[n] for n in names}, x, **options)
            if len(names) == len(ALL):
                assert_close(out, formula(module, values, x))
    assert binds == [tuple(names) for names, _ in calls]


def test_equal_modules_have_plans_of_their_own(binds: list[Any]) -> None:
    class AlwaysEqual(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    weight = torch.zeros(2, 2)
    modules = [AlwaysEqual(2, 2), AlwaysEqual(2, 2, bias=False)]
    for _ in range(2):
        for module in modules:
            with unchanged(module):
                out = functional_call(module, {"weight": weight}, torch.rand(1, 2))
            assert torch.equal(out[0], torch.zeros(2) if module.bias is None else module.bias)
    assert len(binds) == 2


def test_names_of_plain_attributes_are_resolved_each_time(binds: list[Any]) -> None:
    """Nothing tells when an attribute that is not registered comes or goes."""
    module, given = Pair(), {"extra": torch.zeros(2)}
    for count in (1, 2):
        functional_call(module, given, torch.rand(1, 2))
        assert len(binds) == count
    module.extra = "not a tensor"
    with pytest.raises(TypeError, match="'extra'"):
        functional_call(module, given, torch.rand(1, 2))
    assert module.extra == "not a tensor"


def test_a_module_in_a_plain_attribute_may_be_replaced() -> None:
    module = nn.Module()
    module.forward = lambda x: module.hidden[0](x)
    given = {"hidden.0.weight": torch.eye(2), "hidden.0.bias": torch.zeros(2)}
    x = torch.rand(1, 2)
    for _ in range(2):
        object.__setattr__(module, "hidden", nn.Sequential(nn.Linear(2, 2)))
        own = module.hidden[0].weight
        assert torch.equal(functional_call(module, given, x), x)
        assert module.hidden[0].weight is own


def test_errors_are_not_kept() -> None:
    module, x = Pair(), torch.rand(1, 2)
    values = values_of(ALL)
    given = {**values, "c.weight": torch.rand(2)}
    with pytest.raises(AttributeError, match=r"'c\.weight'"):
        functional_call(module, given, x)
    module.c = nn.Linear(2, 2)
    assert_close(functional_call(module, given, x), formula(module, values, x))


def test_plans_of_a_module_are_bounded(binds: list[Any]) -> None:
    module, x, value = Pair(), torch.rand(1, 2), torch.zeros(2)
    module.names = nn.ParameterDict({f"p{i}": torch.zeros(2) for i in range(40)})
    keys = [f"names.p{i}" for i in range(plan.PLANS_PER_MODULE + 1)]
    for key in keys:
        functional_call(module, {key: value}, x)
    assert len(binds) == len(keys)
    functional_call(module, {keys[-1]: value}, x)
    functional_call(module, {keys[1]: value}, x)
    assert len(binds) == len(keys)
    functional_call(module, {keys[0]: value}, x)  # the oldest had to go
    assert len(binds) == len(keys) + 1


def test_a_copy_makes_plans_of_its_own(binds: list[Any]) -> None:
    module, values, x = Pair(), values_of(ALL), torch.rand(1, 2)
    functional_call(module, values, x)
    twin = copy.deepcopy(module)
    binds.clear()
    with unchanged(module), unchanged(twin):
        functional_call(twin, values, x)
        functional_call(module, values, x)
    assert len(binds) == 1
