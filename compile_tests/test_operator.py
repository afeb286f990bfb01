"""A call under ``torch.compile(fullgraph=True)`` is one operator, with the results of eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import capture, check_compiled, fresh, gradients
from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Counter,
    Normed,
    Shared,
    Symmetric,
    Tied,
    parametrized,
)
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


def weights(module: nn.Module, *, seed: int = 1) -> dict[str, Tensor]:
    """Random values for all of ``module``, those for parameters requiring grad."""
    state = state_of(module, seed=seed)
    for name, _ in module.named_parameters():
        state[name].requires_grad_()
    return state


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_model(name: str) -> None:
    module, x = EXAMPLES[name]()
    result = check_compiled(lambda p, x: call(module, p, x), weights(module), x, module=module)
    expected = loaded(module, weights(module))(in_float64(x))
    assert_close(result.out, expected, dtype=x.dtype if x.is_floating_point() else torch.float32)


ENCODER = {"l1.weight", "l1.bias"}

WAYS_TO_CALL: dict[str, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]] = {
    "arguments in a tuple": lambda m, p, x: call(m, p, (x,)),
    "arguments in kwargs": lambda m, p, x: call(m, p, None, {"x": x, "scale": 2.0}),
    "a tensor in kwargs": lambda m, p, x: call(m, p, x, {"scale": x[0, 0]}),
    "strict": lambda m, p, x: call(m, p, x, strict=True),
    "another method": lambda m, p, x: call(m, p, x, method="encode"),
    "in another order": lambda m, p, x: call(m, dict(reversed(p.items())), x),
    "a list of dicts": lambda m, p, x: call(
        m, [{n: p[n] for n in p if n in ENCODER}, {n: p[n] for n in p if n not in ENCODER}], x
    ),
    "computed values": lambda m, p, x: call(m, {n: v.exp() for n, v in p.items()}, x),
    "views of one tensor": lambda m, p, x: call(m, p | {"l2.bias": p["l1.bias"][:2]}, x),
    "a part": lambda m, p, x: call(m, {n: p[n] for n in ENCODER}, x),
    "nothing": lambda m, p, x: call(m, {}, x),
    "the own parameters": lambda m, p, x: call(m, dict(m.named_parameters()), x),
    "in no_grad": torch.no_grad()(lambda m, p, x: call(m, p, x)),
    "in autocast": torch.autocast("cpu", torch.bfloat16)(lambda m, p, x: call(m, p, x)),
    "of views": lambda m, p, x: call(m, {n: v.view_as(v) for n, v in p.items()}, x.mT.mT),
}


@pytest.mark.parametrize("way", WAYS_TO_CALL)
def test_ways_to_call(way: str) -> None:
    module, x = EXAMPLES["MLP"]()
    check_compiled(lambda p, x: WAYS_TO_CALL[way](module, p, x), weights(module), x, module=module)


def a_loop(module: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    for step in range(3):
        x = torch.cat([x[:, :1], call(module, p, x) * step], 1)
    return x


SEVERAL_CALLS: dict[str, tuple[int, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]]] = {
    "two weight sets": (
        2,
        lambda m, p, x: call(m, p, x) + call(m, {n: v * 2 for n, v in p.items()}, x),
    ),
    "two methods": (2, lambda m, p, x: (call(m, p, x), call(m, p, x, method="encode"))),
    "two name sets": (2, lambda m, p, x: (call(m, p, x), call(m, {n: p[n] for n in ENCODER}, x))),
    "a loop": (3, a_loop),
    "beside a plain call": (1, lambda m, p, x: m(x) + call(m, p, x) + m(x)),
}


@pytest.mark.parametrize("way", SEVERAL_CALLS)
def test_several_calls_of_one_module(way: str) -> None:
    count, fn = SEVERAL_CALLS[way]
    module, x = EXAMPLES["MLP"]()
    p = weights(module)
    route = ["operator"] * count
    check_compiled(lambda p, x: fn(module, p, x), p, x, module=module, route=route)


def test_gradients_by_autograd_grad() -> None:
    torch._dynamo.reset()
    module, x = EXAMPLES["MLP"]()
    p = weights(module)
    compiled = torch.compile(lambda p, x: call(module, p, x), fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(p, x).square().sum(), list(p.values()))
    expected = torch.autograd.grad(call(module, p, x).square().sum(), list(p.values()))
    assert_close(actual, expected)


def test_gradients_reach_the_tensors_that_stay_the_module_s_own() -> None:
    torch._dynamo.reset()
    module, x = EXAMPLES["MLP"]()
    p = weights(module)
    part = {"l1.weight": p["l1.weight"]}
    grads = []
    for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        fn(module, part, x).sum().backward()
        grads.append(gradients([*module.parameters(), *part.values()]))
        p["l1.weight"].grad = None
    assert_close(grads[1], grads[0])
    assert [grad is None for grad in grads[1]] == [True, False, False, False, False]


def split(p: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(list(p.items())[:2]), dict(list(p.items())[2:])]


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_buffers_written_in_place(kind: str) -> None:
    module, x = EXAMPLES["Normed"]()
    p = state_of(module)
    given = p if kind == "dict" else split(p)
    mean = p["norm.running_mean"]
    with unchanged(module):
        capture(lambda p, x: call(module, p, x), given, x)
    assert mean.abs().sum() > 0, "the tensor that the caller gave holds the new value"
    assert p["norm.num_batches_tracked"] == 1
    check_compiled(lambda p, x: call(module, p, x), given, x, module=module)


class TwoCounters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Counter(), Counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) * self.b(x)


@pytest.mark.parametrize("backend", ["aot_eager", None])
def test_buffers_reassigned(backend: str | None) -> None:
    torch._dynamo.reset()
    module = TwoCounters()
    given = [{"a.foo": torch.tensor(3.0)}, {"b.foo": torch.tensor(5.0)}]
    before = [dict(part) for part in given]
    fn = torch.compile(call, fullgraph=True, backend=backend) if backend else call
    with unchanged(module):
        out = fn(module, given, torch.ones(2))
    assert_close(out, torch.full((2,), (1 + 4.0) * (1 + 6.0) * (1 + 7.0)))
    assert_close(given, [{"a.foo": torch.tensor(4.0)}, {"b.foo": torch.tensor(7.0)}])
    assert_close(before, [{"a.foo": torch.tensor(3.0)}, {"b.foo": torch.tensor(5.0)}])


def test_reassigned_buffers_are_there_for_what_follows() -> None:
    def fn(p: dict[str, Tensor], x: Tensor) -> Any:
        a = call(module, p, x)
        b = call(module, p, x)
        return a, b, p["foo"] * 2

    module = Counter()
    p = {"foo": torch.tensor(1.0)}
    result = check_compiled(fn, p, torch.zeros(1), module=module, route=["operator"] * 2)
    assert_close(result.out, (torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor(6.0)))


def test_the_dict_changes_after_the_call() -> None:
    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = call(module, p, x)
        p["l1.bias"] = p["l1.bias"] + 1
        del p["l1.weight"]
        p["new"] = out
        return out

    module, x = EXAMPLES["MLP"]()
    check_compiled(fn, state_of(module, seed=1), x, module=module)


TIES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str], bool]] = {
    "tied, the first name": (Tied, torch.arange(5), ["embed.weight"], True),
    "tied, the second name": (Tied, torch.arange(5), ["out.weight"], True),
    "tied, one tensor for both": (Tied, torch.arange(5), ["out.weight", "embed.weight"], True),
    "untied, the first name": (Tied, torch.arange(5), ["embed.weight"], False),
    "untied, the second name": (Tied, torch.arange(5), ["out.weight"], False),
    "shared, the first path": (Shared, torch.rand(2, 3), ["first.weight"], True),
    "shared, the second path": (Shared, torch.rand(2, 3), ["second.weight"], True),
    "shared, tie_weights=False": (Shared, torch.rand(2, 3), ["second.weight"], False),
    "shared, both": (Shared, torch.rand(2, 3), ["first.weight", "second.weight"], False),
}


@pytest.mark.parametrize("case", TIES)
def test_ties(case: str) -> None:
    make, x, names, tie_weights = TIES[case]
    module = make()
    value = torch.rand_like(next(module.parameters())).requires_grad_()
    p = dict.fromkeys(names, value)
    check_compiled(lambda p, x: call(module, p, x, tie_weights=tie_weights), p, x, module=module)


def test_untied_values_differ() -> None:
    module, x = Tied(), torch.arange(5)
    p = {"embed.weight": torch.rand(7, 4), "out.weight": torch.rand(7, 4)}
    check_compiled(lambda p, x: call(module, p, x, tie_weights=False), p, x, module=module)


@pytest.mark.parametrize("name", ["0.weight", "0.parametrizations.weight.original"])
def test_parametrized(name: str) -> None:
    module, x = parametrized(), torch.rand(2, 3)
    p = {name: torch.rand(3, 3).requires_grad_()}
    result = check_compiled(lambda p, x: call(module, p, x), p, x, module=module)
    weight = p[name] if name == "0.weight" else Symmetric()(p[name])
    expected = module[2](torch.nn.functional.linear(x, weight, module[0].bias).tanh())
    assert_close(result.out, expected)


class Pair(NamedTuple):
    first: Tensor
    label: str


@dataclass
class Report:
    value: Tensor
    label: str
    parts: dict[str, Any]


class Structured(nn.Module):
    """Takes and returns nests of tensors and other things."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, nest: Any, *, scale: float, flag: bool, how: str, bias: Any = None) -> Any:
        y = self.linear(nest["list"][0]) * scale + nest["list"][1]["x"]
        y = y if bias is None else y + bias
        y = y.tanh() if flag else y
        if how == "namedtuple":
            return Pair(y, how), None
        if how == "dict":
            return {"a": [y, {"b": (y.sum(), scale, flag)}], "n": None, "how": how}
        return Report(y, how, {"y": y.mean()})


@pytest.mark.parametrize("how", ["namedtuple", "dict"])
@pytest.mark.parametrize("flag", [True, False])
def test_nested_inputs_and_outputs(how: str, flag: bool) -> None:
    module = Structured()
    nest = {"list": [torch.rand(2, 3), {"x": torch.rand(3), "unused": torch.rand(1)}]}
    options = {"scale": 1.5, "flag": flag, "how": how}
    p = weights(module)
    check_compiled(lambda p, nest: call(module, p, (nest,), options), p, nest, module=module)


def test_a_dataclass_is_returned() -> None:
    module, p = Structured(), state_of(Structured(), seed=1)
    nest = {"list": [torch.rand(2, 3), {"x": torch.rand(3)}]}
    options = {"scale": 1.5, "flag": True, "how": "dataclass", "bias": torch.rand(3)}
    out = capture(lambda p, nest: call(module, p, (nest,), options), p, nest).out
    expected = call(module, p, (nest,), options)
    assert type(out) is Report
    assert_close(vars(out), vars(expected))


@pytest.mark.parametrize("method", [None, "forward"])
def test_hooks(method: str | None) -> None:
    module, x = EXAMPLES["MLP"]()
    module.l1.register_forward_hook(lambda m, args, out: out * 2)
    module.l2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    module.register_forward_hook(lambda m, args, out: out * 3)
    p = weights(module)
    result = check_compiled(lambda p, x: call(module, p, x, method=method), p, x, module=module)
    hidden = torch.nn.functional.linear(x, p["l1.weight"], p["l1.bias"]) * 2
    out = torch.nn.functional.linear(hidden.tanh() + 1, p["l2.weight"], p["l2.bias"])
    assert_close(result.out, out if method else out * 3)  # a method is called without hooks


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_around_the_compiled_call(mode: Callable[[], Any]) -> None:
    module, x = EXAMPLES["MLP"]()
    with mode():
        check_compiled(lambda p, x: call(module, p, x), weights(module), x, module=module)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_of_a_compiled_module(prefix: str) -> None:
    plain, x = EXAMPLES["MLP"]()
    module = torch.compile(plain, backend="aot_eager")
    p = {prefix + name: value for name, value in weights(plain).items()}
    result = check_compiled(lambda p, x: call(module, p, x), p, x, module=plain)
    assert_close(result.out, call(plain, weights(plain), x))


class CallsItself(MLP):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            doubled = {n: v * 2 for n, v in self.named_parameters()}
            return call(self, doubled, (x, depth - 1)) + super().forward(x)
        return super().forward(x)


class CallsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = MLP()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        fast = {n: v * 0.5 for n, v in self.child.named_parameters()}
        return (call(self.child, fast, x) + self.child(x)) * self.scale


class CallsTied(nn.Module):
    """Its child's ties count also while an outer call has replaced the tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Tied()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, 0].long()
        fast = {"out.weight": self.child.embed.weight * 2}
        return call(self.child, fast, tokens) + self.child(tokens)


@pytest.mark.parametrize(("make", "count"), [(CallsItself, 3), (CallsChild, 2), (CallsTied, 2)])
def test_calls_inside_of_a_call(make: Callable[[], nn.Module], count: int) -> None:
    module, x = make(), torch.rand(4, 3)
    route = ["operator"] * count
    check_compiled(lambda p, x: call(module, p, x), weights(module), x, module=module, route=route)


class Broken(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.encode(x)
        torch._dynamo.graph_break()
        return self.l2(hidden) * scale


# Dynamo itself looks at .grad of what it finds after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", [Broken, Normed])
def test_a_graph_break_inside_of_the_module(make: Callable[[], nn.Module]) -> None:
    module = make()
    x = torch.rand(4, 3) if make is Broken else torch.rand(4, 2, 6, 6)
    if make is Normed:  # a break after the buffers were written
        module.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    eager, compiled = fresh(weights(module)), fresh(weights(module))
    with unchanged(module):
        expected = call(module, eager, x)
        result = capture(lambda p, x: call(module, p, x) * 2, compiled, x, fullgraph=False)
        result.out.sum().backward()
    assert result.breaks > 0
    plain = capture(lambda x: module(x) * 2, x, fullgraph=False)
    assert len(result.graphs) == len(plain.graphs), "what the module calls is compiled the same"
    assert_close(result.out, expected * 2)
    assert_close(compiled, eager)
    (expected * 2).sum().backward()
    assert_close(gradients(compiled), gradients(eager))
