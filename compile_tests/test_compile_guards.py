"""What leaves the fast route of ``fcall.compile``: each thing that could change a result."""

from __future__ import annotations

import collections
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fcall
from compile_tests.support.compiled import backward, fresh, gradients, recording
from compile_tests.support.fast import fast_call, readings, route_of
from compile_tests.support.models import EXAMPLES, MLP, Normed
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


class Reads(MLP):
    """Reads all kinds of things while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.power = 1
        self.settings = {"shift": 0.0}
        self.scales = [1.0, 2.0]
        self.plain = torch.ones(2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale=scale * self.power) + self.settings["shift"]
        y = y * self.scales[0] * GLOBAL["factor"] * self.plain
        return y * 2 if self.training else y


GLOBAL = {"factor": 1.0}


class Tripled(MLP):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * 3


def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 100


def pre_hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def replace_hooks(module: nn.Module) -> None:
    module.l1._forward_hooks = collections.OrderedDict({0: hook})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda m: setattr(m, "power", 3),
    "eval": lambda m: m.eval(),
    "dict": lambda m: m.settings.update(shift=1.0),
    "list": lambda m: m.scales.__setitem__(0, 5.0),
    "global": lambda m: GLOBAL.update(factor=7.0),
    "plain tensor replaced": lambda m: setattr(m, "plain", torch.full((2,), 3.0)),
    "plain tensor written": lambda m: m.plain.mul_(3),
    "plain tensor of another kind": lambda m: setattr(m, "plain", torch.full((1,), 3.0)),
    "forward": lambda m: setattr(m, "forward", lambda x: m.encode(x)),
    "method": lambda m: setattr(m, "encode", lambda x: m.l1(x).relu()),
    "class": lambda m: setattr(m, "__class__", Tripled),
    "submodule": lambda m: setattr(m, "l1", nn.Sequential(nn.Linear(3, 4), nn.ReLU())),
    "submodule of another size": lambda m: setattr(m, "l2", nn.Linear(4, 1)),
    "parameter written": lambda m: m.l2.bias.data.add_(1),
    "parameter replaced": lambda m: setattr(m.l2, "bias", nn.Parameter(torch.ones(2))),
    "parameter taken away": lambda m: setattr(m.l2, "bias", None),
    "parameter's data replaced": lambda m: setattr(m.l2.bias, "data", torch.full((2,), 9.0)),
    "parameter frozen": lambda m: m.l2.weight.requires_grad_(False),
    "tied": lambda m: setattr(m.l2, "bias", nn.Parameter(m.l1.weight[:2, 0].detach())),
    "hook": lambda m: m.register_forward_hook(hook),
    "hook of a child": lambda m: m.l1.register_forward_hook(hook),
    "pre-hook": lambda m: m.l2.register_forward_pre_hook(pre_hook),
    "dict of hooks": replace_hooks,
}


@pytest.mark.parametrize("given", ["all", "some"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_module(change: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GLOBAL, "factor", 1.0)
    module, x = Reads(), torch.rand(5, 3)
    names = ["l1.weight", "l1.bias"] if given == "some" else list(state_of(module))
    p = {name: value for name, value in state_of(module, seed=1).items() if name in names}
    fn, _ = fast_call(module, p, x)
    with torch.no_grad():
        CHANGES[change](module)
    if change == "submodule":  # its names are others now
        p = {name: value for name, value in p.items() if not name.startswith("l1.")}
        p["l1.0.weight"] = torch.rand(4, 3)
    if change == "submodule of another size":
        p = {n: torch.rand(1, *v.shape[1:]) if n.startswith("l2.") else v for n, v in p.items()}
    expected = call(module, p, x)
    for _ in range(3):
        out = fn(p, x)
        assert_close(out, expected)
        assert out.requires_grad == expected.requires_grad


def test_a_hook_taken_away() -> None:
    module, x = EXAMPLES["MLP"]()
    handle = module.l1.register_forward_hook(hook)
    p = state_of(module, seed=1)
    fn, graphs = fast_call(module, p, x)
    handle.remove()
    for _ in range(2):
        assert_close(fn(p, x), call(module, p, x))
    module.l1.register_forward_hook(hook)
    assert_close(fn(p, x), call(module, p, x))
    assert len(graphs) == 2  # the first graph is right again


def test_a_hook_on_a_call_that_is_always_guarded() -> None:
    module = nn.Linear(2, 2)
    value, x = torch.rand(2, 2), torch.rand(2)
    p = {"weight": value, "bias": x}  # one tensor in two places
    fn = fcall.compile(module, backend="aot_eager")
    _, route = route_of(fn, p, x)
    assert (route.kind, route.reason) == ("guarded", "one tensor is given in two places")
    module.register_forward_hook(hook)
    assert_close(fn(p, x), call(module, p, x))


def changed(p: dict[str, Tensor], **changes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return weights of which those given, by names with underscores, are changed."""
    return {
        name: changes[key](value) if (key := name.replace(".", "_")) in changes else value
        for name, value in p.items()
    }


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda t: t.t().contiguous().t(),
    "storage offset": lambda t: torch.cat([torch.ones(1, 3), t])[1:],
    "dtype": lambda t: t.double(),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "negative view": lambda t: torch.complex(t, -t).conj().imag,
    "sparse": lambda t: t.to_sparse(),
    "a size": lambda t: torch.cat([t, t]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_other_kinds(kind: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh())
    x = torch.rand(5, 3)
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    other = {"0.weight": WEIGHTS[kind](p["0.weight"])}
    xs = x.double() if kind == "dtype" else x
    for _ in range(3):
        out, expected = fn(other, xs), call(module, other, xs)
        assert_close(out, expected)
        assert out.requires_grad == expected.requires_grad
    assert_close(fn(p, x), call(module, p, x))


class Around(TorchDispatchMode):
    """Counts operations and changes none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Made(nn.Linear):
    """Makes a tensor, whose dtype and device are the default ones."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.ones(2) / 3
        out = super().forward(x) * made.to(x.dtype)
        return out + made.element_size() + torch.is_grad_enabled()


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "threads": lambda: threads(torch.get_num_threads() + 1),
    "dispatch mode": Around,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t * 2, lambda t: t
    ),
    "stance": lambda: torch.compiler.set_stance("force_eager"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_around_the_call(around: str, grad: bool) -> None:
    module, x = Made(2, 2), torch.rand(3, 2)
    p = {name: value.requires_grad_(grad) for name, value in state_of(module, seed=1).items()}
    fn, _ = fast_call(module, p, x)
    for _ in range(2):
        q, same = fresh(p), fresh(p)
        with AROUND[around]():
            out, route = route_of(fn, q, x)
            expected = call(module, same, x)
        assert_close(out, expected)
        assert (out.dtype, out.requires_grad) == (expected.dtype, expected.requires_grad)
        assert out.is_inference() == expected.is_inference()
        if out.requires_grad and around != "saved tensors hooks":
            backward(out)
            backward(expected)
            assert_close(gradients(q), gradients(same))
        if around in ("dispatch mode", "saved tensors hooks", "stance"):
            assert route.kind == "guarded"
    assert route_of(fn, p, x)[1].kind == "fast"
    with AROUND[around]():
        route_of(fn, p, x)
    assert_close(fn(p, x), call(module, p, x))


def test_saved_tensors_hooks_are_not_passed_by() -> None:
    module, x = EXAMPLES["MLP"]()
    p = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    fn, _ = fast_call(module, p, x)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn(p, x)
    assert packed


def test_a_mode_sees_the_operations() -> None:
    module, x = EXAMPLES["MLP"]()
    fn, _ = fast_call(module, state_of(module), x)
    with Around() as mode:
        fn(state_of(module), x)
    assert mode.count


def test_one_tensor_in_two_places() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.ones(2))
            self.register_buffer("b", torch.ones(2))
            self.register_buffer("own", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.a.mul_(2)
            return self.a + self.b * x + self.own

    module, x = Scales(), torch.rand(2)
    p = {"a": torch.rand(2), "b": torch.rand(2)}
    fn, _ = fast_call(module, p, x)
    one = torch.rand(2)
    for make in (
        lambda t: ({"a": t, "b": t}, x),
        lambda t: ({"a": t, "b": torch.ones(2)}, t),
        lambda t: ({"a": torch.ones(2), "b": t}, t),
    ):
        for _ in range(2):
            t, same = one.clone(), one.clone()
            (q, y), (q2, y2) = make(t), make(same)
            assert_close(fn(q, y), call(module, q2, y2))
            assert_close(q, q2)
    twin = Scales()
    for _ in range(2):
        assert_close(
            fn({"a": module.own, "b": torch.ones(2)}, x),
            call(twin, {"a": twin.own, "b": torch.ones(2)}, x),
        )
        assert_close(module.own, twin.own)


class Remembers(nn.Module):
    """Keeps its parameter in a second place, and a buffer that it reassigns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 3.0))
        self.also = [self.weight]
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x * self.weight + self.also[0] * 10 + self.steps


def test_a_parameter_that_the_module_has_in_a_second_place() -> None:
    module, x = Remembers(), torch.rand(2)
    p = {"weight": torch.rand(2)}
    fn = fcall.compile(module, backend="aot_eager")
    for change in (
        lambda: None,
        lambda: None,
        lambda: module.weight.data.mul_(2),
        lambda: setattr(module, "weight", nn.Parameter(torch.ones(2))),
        lambda: module.also.__setitem__(0, torch.full((2,), 7.0)),
        lambda: module.also[0].resize_(1).fill_(1.0),
        lambda: None,
    ):
        change()
        given = p["weight"]
        expected = x * given + module.also[0] * 10 + module.steps + 1
        steps = int(module.steps)
        assert_close(fn(p, x), expected)
        assert module.steps == steps + 1
        assert p["weight"] is given


def test_a_tensor_from_elsewhere_that_is_a_weight_later() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(2))
            self.log = [torch.ones(2)]

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x)
            return self.total + self.log[0]

    module, x = Outside(), torch.rand(2)
    fn, _ = fast_call(module, {"total": torch.zeros(2)}, x)
    for _ in range(3):
        value = module.log[0].clone()
        assert_close(fn({"total": module.log[0]}, x), (value + x) * 2)


def test_the_module_s_own_tensors_as_weights_compile_nothing() -> None:
    module, x = Normed(), torch.rand(4, 2, 6, 6)
    own = {n: p.detach() for n, p in module.named_parameters()}
    own |= dict(module.named_buffers())
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    for steps in range(1, 4):
        other = state_of(module, seed=1)
        same = fresh(other)
        assert_close(fn(own, x), loaded(module, own)(in_float64(x)))
        assert module.norm.num_batches_tracked == steps
        assert_close(fn(other, x), call(module, same, x))
        assert_close(other, same)
    assert len(graphs) == 1


def test_eager_calls_between() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    call(module, p, x)
    assert route_of(fn, p, x)[1].kind == "fast"


def test_forward_mode() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(v, v * 2) for n, v in p.items()}
        _, route = route_of(fn, dual, x)
    assert route.kind == "guarded"


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_in_make_fx(pre_dispatch: bool) -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    traced = make_fx(lambda p, x: fn(p, x), pre_dispatch=pre_dispatch)(p, x)
    other = state_of(module, seed=2)
    assert_close(traced(other, x), call(module, other, x))


def test_in_export() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)

    class Calls(nn.Module):
        def forward(self, p: Any, x: Tensor) -> Tensor:
            return fn(p, x)

    other = state_of(module, seed=2)
    for strict in (False, True):
        program = torch.export.export(Calls(), (p, x), strict=strict)
        assert_close(program.module()(other, x), call(module, other, x))


def test_in_transforms() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    stacked = {name: torch.stack([value, value * 2]) for name, value in p.items()}

    def loss(f: Callable[..., Any], p: Any) -> Tensor:
        return f(p, x).square().sum()

    for transform in (
        lambda f: torch.func.grad(lambda p: loss(f, p))(p),
        lambda f: torch.func.vmap(lambda p: f(p, x))(stacked),
        lambda f: torch.func.vmap(torch.func.grad(lambda p: loss(f, p)))(stacked),
        lambda f: torch.func.vmap(lambda y: f(p, x) + y)(torch.ones(3, 1)),
        lambda f: torch.func.jvp(lambda p: f(p, x), (p,), (p,)),
    ):
        assert_close(transform(fn), transform(lambda p, x: call(module, p, x)))
    assert route_of(fn, p, x)[1].kind == "fast"


def test_in_a_compiled_function_and_in_traces() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    expected = call(module, p, x) + 1
    outer = torch.compile(lambda p, x: fn(p, x) + 1, backend="aot_eager", fullgraph=True)
    assert_close(outer(p, x), expected)
    assert_close(torch.compile(lambda p, x: _break(fn, p, x), backend="aot_eager")(p, x), expected)


def _break(fn: Any, p: Any, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return fn(p, x) + 1


def test_graph_breaks() -> None:
    class Breaks(MLP):
        def encode(self, x: Tensor) -> Tensor:
            out = super().encode(x)
            torch._dynamo.graph_break()
            return out * 2

    module, x = Breaks(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    fn = fcall.compile(module, backend="aot_eager")
    for _ in range(3):
        out, route = route_of(fn, p, x)
        assert_close(out, loaded(module, p)(in_float64(x)))
        assert route.kind == "guarded"


class Scaled(MLP):
    """Breaks the graph, and calls a function of other tensors by the name of a frame's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        out = self.encode(x)
        torch._dynamo.graph_break()
        return out * _mean(self.scales)


def _mean(weights: list[Tensor]) -> Tensor:
    torch._dynamo.graph_break()
    return weights[0].sum() / len(weights[0].flatten())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_functions_called_after_a_graph_break_keep_their_guards(backend: str) -> None:
    module, x = Scaled(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    fn = fcall.compile(module, backend=backend)
    for scales in (torch.ones(1, 2), torch.full((3, 2), 2.0), torch.ones(2, 2).double()):
        module.scales = [scales]
        assert_close(fn(p, x), call(module, p, x))


def test_python_state_is_kept() -> None:
    class Counts(MLP):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    module, x = Counts(), torch.rand(2, 3)
    p = state_of(module, seed=1)
    fn = fcall.compile(module, backend="aot_eager")
    for count in range(1, 6):
        assert_close(fn(p, x), loaded(MLP(), p)(in_float64(x)) * count)
        assert module.calls == count


def test_an_exception_leaves_all_as_it_was() -> None:
    class Fails(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, torch.full((1,), 5) * (x.sum() > 0)]

    module, x = Fails(), -torch.ones(2, 3)
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    with unchanged(module):
        for _ in range(2):
            with pytest.raises((IndexError, RuntimeError)):
                fn(p, -x)
    assert_close(fn(p, x), call(module, p, x))


@pytest.mark.parametrize("compiled_before", [True, False])
def test_eight_threads(compiled_before: bool) -> None:
    module, x = Normed().eval(), torch.rand(4, 2, 6, 6)
    sets = [state_of(module, seed=seed) for seed in range(8)]
    expected = [call(module, p, x) for p in sets]
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    if compiled_before:
        fn(sets[0], x)
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        for _ in range(50):
            out, want = fn(sets[number], x), expected[number]
            if not torch.allclose(out, want, rtol=1e-4, atol=1e-5):
                wrong.append(number)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert len(graphs) == 1


def test_what_guards_compare_with_may_be_freed() -> None:
    module, x = EXAMPLES["MLP"]()

    def times(factor: int) -> Callable[[Tensor], Tensor]:
        return lambda t: t * factor

    module.act = times(2)
    module.forward = lambda x: module.act(module.encode(x))
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    for factor in (3, 4, 5):
        module.act = times(factor)
        gc.collect()
        for _ in range(2):
            assert_close(fn(p, x), call(module, p, x))


def test_no_compilation_is_said_to_be_needed() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, _ = fast_call(module, p, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for given in readings(p):
            assert_close(fn(given, x), loaded(module, p)(in_float64(x)))
        with pytest.raises(RuntimeError, match="Detected recompile"):
            fn(p, x[:, :, None].squeeze(2).t().contiguous().t())


def test_reset_compiles_anew() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn, graphs = fast_call(module, p, x)
    torch.compiler.reset()
    assert_close(fn(p, x), call(module, p, x))
    assert len(graphs) == 2
    assert route_of(fn, p, x)[1].kind == "fast"


def test_frames_are_bounded() -> None:
    module = nn.Linear(3, 2)
    fn = fcall.compile(module, backend="eager")
    for size in range(1, 20):
        p = {"weight": torch.rand(size, 3), "bias": torch.rand(size)}
        assert fn(p, torch.rand(2, 3)).shape == (2, size)
    assert len(fn._frames) == len(fn._routes) == 16


@pytest.mark.parametrize("name", ["entries_of", "is_plain"])
def test_without_a_private_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise fcall._torch.DynamoUnavailableError(name)

    monkeypatch.setattr(fcall._torch.compiling, "compiled_calls", missing)
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn = fcall.compile(module, backend="aot_eager")
    for _ in range(2):
        out, route = route_of(fn, p, x)
        assert_close(out, loaded(module, p)(in_float64(x)))
        assert (route.kind, name in route.reason) == ("guarded", True)
