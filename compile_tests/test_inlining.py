"""Bodies that cannot be captured are inlined, with eager's results, and it is said why."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fcall
from compile_tests.support.compiled import backward, capture, fresh, gradients
from compile_tests.support.models import MLP, Counter, PythonState, Recurrent
from compile_tests.support.oracle import assert_close, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


class Appends(MLP):
    """Keeps a list of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale=scale)
        self.seen.append(y.detach())
        return y


class SetsAttribute(MLP):
    """Leaves a tensor behind in a plain attribute."""

    last: Tensor | None = None

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.last = self.encode(x).detach()
        return self.l2(self.last) * scale


class Scaled(MLP):
    """Multiplies by a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(2.0)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(x) * self.factor


class TwoBuffers(nn.Module):
    """Reassigns both of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(1.0))
        self.register_buffer("b", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.a, self.b = self.a + 1, self.b * 2
        return x * self.a * self.b


class CounterInPython(Counter):
    """A body to be inlined that also reassigns a buffer it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    give: Callable[[nn.Module], dict[str, Tensor]]
    cause: str
    """What of the route's reason tells the cause."""
    effect: Callable[[nn.Module], Any] | None = None
    """What the call leaves behind in the module; nothing where there is none."""
    x: Tensor = torch.rand(5, 3)
    backend: str = "aot_eager"


def everything(module: nn.Module) -> dict[str, Tensor]:
    state = state_of(module, seed=1)
    for name, _ in module.named_parameters():
        state[name].requires_grad_()
    return state


CASES = {
    "attribute counted up": Case(PythonState, everything, "'calls'", lambda m: m.calls),
    "list appended to": Case(Appends, everything, "ListVariable", lambda m: m.seen),
    "attribute set": Case(SetsAttribute, everything, "SetsAttribute", lambda m: m.last),
    "buffer reassigned, none given": Case(Counter, lambda m: {}, "Dict", lambda m: m.foo),
    "buffer reassigned, another given": Case(
        TwoBuffers,
        lambda m: {"a": torch.tensor(3.0)},
        "reassigns a tensor it was given no value for",
        lambda m: (m.a, m.b),
    ),
    "buffer reassigned, given": Case(CounterInPython, everything, "'calls'", lambda m: m.calls),
    # On a CPU, AOTAutograd cannot train torch's LSTM, with or without fcall (torch 2.13).
    "LSTM": Case(Recurrent, everything, "LSTM", None, torch.rand(2, 4, 3), "eager"),
    "LSTM, no gradient": Case(Recurrent, state_of, "LSTM", None, torch.rand(2, 4, 3)),
    "LSTM, a part": Case(
        Recurrent,
        lambda m: {"lstm.weight_hh_l0": torch.full((16, 4), 0.1)},
        "LSTM",
        None,
        torch.rand(2, 4, 3),
        "eager",
    ),
    "attribute given": Case(
        Scaled, lambda m: {"factor": torch.tensor(3.0, requires_grad=True)}, "Scaled"
    ),
    "unexpected name": Case(
        MLP, lambda m: {"nothing": torch.ones(1), "l1.bias": torch.ones(4)}, "MLP"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_eager_s_results_and_side_effects(name: str) -> None:
    case = CASES[name]
    module = case.make()
    twin = copy.deepcopy(module)
    p, same = case.give(module), fresh(case.give(module))
    expected = call(twin, same, case.x)
    backward(expected)
    with unchanged(module) if case.effect is None else contextlib.nullcontext():
        result = capture(lambda p, x: call(module, p, x), p, case.x, backend=case.backend)
        backward(result.out)
    assert_close(result.out, expected)
    assert_close(p, same)
    assert_close(gradients(p), gradients(same))
    assert_close(gradients(list(module.parameters())), gradients(list(twin.parameters())))
    if case.effect is not None:
        assert_close(case.effect(module), case.effect(twin))
    assert result.kinds == ["inlined"]
    assert result.breaks == 0
    assert case.cause in result.routes[0].reason
    assert "\n" not in result.routes[0].reason


def test_calls_one_after_the_other() -> None:
    module, p = PythonState(), state_of(PythonState(), seed=1)
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    fn = torch.compile(lambda p, x: call(module, p, x), fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.rand(2, 3)
        assert_close(fn(p, x), call(twin, p, x))
    assert module.calls == 4


def test_several_inlined_calls_in_one_function() -> None:
    def fn(modules: list[nn.Module]) -> Callable[..., Any]:
        return lambda p, x: [call(m, p, x * i) for i, m in enumerate(modules)]

    module, other = PythonState(), PythonState()
    modules = [module, other, module, module]
    p, x = state_of(module, seed=1), torch.rand(2, 3)
    expected = fn(copy.deepcopy(modules))(p, x)
    result = capture(fn(modules), p, x)
    assert_close(result.out, expected)
    assert (module.calls, other.calls) == (3, 1)
    assert result.kinds == ["inlined"] * 4, "once a call, however often Dynamo starts again"


def test_only_what_cannot_be_captured_is_inlined() -> None:
    def fn(p: dict[str, Tensor], q: dict[str, Tensor], r: dict[str, Tensor], x: Tensor) -> Any:
        y = call(plain, p, x)
        z = call(counting, q, x)
        return y + z, call(seeing, r, x), call(plain, p, x, method="encode")

    plain, counting, seeing = MLP(), PythonState(), Appends()
    p, q, r = (state_of(m, seed=1) for m in (plain, counting, seeing))
    x = torch.rand(2, 3)
    result = capture(fn, p, q, r, x)
    assert (counting.calls, len(seeing.seen)) == (1, 1)
    counting.calls = 0
    assert_close(result.out, fn(p, q, r, x))
    assert [(route.module, route.kind) for route in result.routes] == [
        ("MLP", "operator"),
        ("PythonState", "inlined"),
        ("Appends", "inlined"),
        ("MLP", "operator"),
    ]
    assert [bool(route.reason) for route in result.routes] == [False, True, True, False]
    assert len(result.graphs) == 1


class MayCount(PythonState):
    """A class of which some modules can be captured."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.counts else self.linear(x)


@pytest.mark.parametrize("order", [[False, True], [True, False], [False, True, False]])
def test_modules_of_one_class_are_told_apart(order: list[bool]) -> None:
    modules = [MayCount(counts) for counts in order]
    p, x = state_of(modules[0], seed=1), torch.rand(2, 3)
    expected = [call(module, p, x) for module in copy.deepcopy(modules)]
    result = capture(lambda p, x: [call(module, p, x) for module in modules], p, x)
    assert_close(result.out, expected)
    assert result.kinds == ["inlined" if counts else "operator" for counts in order]


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_inlined_in_a_transform(transform: str) -> None:
    def fn(module: nn.Module) -> Callable[..., Any]:
        def loss(p: dict[str, Tensor]) -> Tensor:
            return call(module, p, x).square().sum()

        return {
            "grad": lambda p: torch.func.grad(loss)(p),
            "vmap": lambda p: torch.func.vmap(loss)(
                {name: torch.stack([value, value * 2]) for name, value in p.items()}
            ),
            "jvp": lambda p: torch.func.jvp(loss, (p,), (p,)),
        }[transform]

    module, x = PythonState(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    expected = fn(copy.deepcopy(module))(p)
    result = capture(fn(module), p)
    assert_close(result.out, expected)
    assert (result.kinds, module.calls) == (["inlined"], 1)


def test_a_call_inside_of_an_inlined_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            halved = {name: value / 2 for name, value in self.inner.named_parameters()}
            return call(self.inner, halved, x) * self.calls

    module, x = Outer(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    expected = call(copy.deepcopy(module), p, x)
    result = capture(lambda p, x: call(module, p, x), p, x)
    assert_close(result.out, expected)
    assert module.calls == 1
    assert sorted((r.module, r.kind) for r in result.routes) == [
        ("MLP", "operator"),
        ("Outer", "inlined"),
    ]


@pytest.mark.parametrize("functional_call", [call, torch.func.functional_call])
def test_nothing_is_inlined_in_a_checkpointed_function(functional_call: Any) -> None:
    """Dynamo lets no dict be written there: neither torch.func nor an inlined call is possible."""

    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return checkpoint(lambda p, x: functional_call(module, p, (x,)), p, x, use_reentrant=False)

    module, x = PythonState(), torch.rand(2, 3)
    with unchanged(module), pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        capture(fn, state_of(module), x)
    assert module.calls == 0


class Prints(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.encode(x)
        print("hidden")
        return self.l2(hidden) * scale


def test_printing_breaks_the_graph_as_it_does_without_fcall(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, x = Prints(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    with unchanged(module):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="print"):
            capture(lambda p, x: call(module, p, x), p, x)
        assert capsys.readouterr().out == ""
        result = capture(lambda p, x: call(module, p, x), p, x, fullgraph=False)
        assert capsys.readouterr().out == "hidden\n"
        assert_close(result.out, call(module, p, x))
    assert result.breaks > 0


@pytest.mark.parametrize("before", [False, True])
def test_the_setting_that_lets_rnns_in_is_put_back(before: bool) -> None:
    def fails(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = call(module, p, x)
        torch._dynamo.graph_break()
        return out

    module, x = Recurrent(), torch.rand(2, 4, 3)
    p = state_of(module, seed=1)
    with torch._dynamo.config.patch(allow_rnn=before):
        capture(lambda p, x: call(module, p, x), p, x, backend="eager")
        assert torch._dynamo.config.allow_rnn is before
        with pytest.raises(torch._dynamo.exc.Unsupported):
            capture(fails, p, x, backend="eager")
        assert torch._dynamo.config.allow_rnn is before


def test_inlining_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = PythonState()
    with caplog.at_level("INFO", logger="fcall"):
        routes = capture(lambda p, x: call(module, p, x), state_of(module), torch.rand(2, 3)).routes
    messages = [r.getMessage() for r in caplog.records if r.name == "fcall"]
    assert messages == [f"the call of PythonState is inlined: {routes[0].reason}"]


def _ensemble(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.vmap(lambda p: call(MODEL, p, (x,)))(p)


def _gradient_of_ensemble(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return torch.func.grad(lambda p: _ensemble(p, x).square().sum())(p)


def _gradients_of_members(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return call(MODEL, p, (x,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (0, None))(p, x)


MODEL = MLP()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fn", [_ensemble, _gradient_of_ensemble, _gradients_of_members])
def test_any_size_under_vmap(fn: Any, dynamic: bool | None) -> None:
    """torch cannot look up such sizes in the graph of a body."""
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for members, samples in [(3, 4), (5, 6), (7, 8)]:
        models = [state_of(MODEL, seed=seed) for seed in range(members)]
        p = {name: torch.stack([one[name] for one in models]) for name in models[0]}
        x = torch.rand(samples, 3)
        with unchanged(MODEL):
            found = compiled(p, x)
        assert_close(found, fn({name: value.double() for name, value in p.items()}, x.double()))
