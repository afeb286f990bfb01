"""What captured graphs look like, and what they do when they are run."""

# ruff: noqa: E501
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import fcall
from compile_tests.support.compiled import capture
from compile_tests.support.graphs import text_of
from compile_tests.support.models import MLP, Counter, Normed
from compile_tests.support.oracle import assert_close, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call


class Owner(nn.Module):
    """Calls a submodule of its own with halved weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor) -> Tensor:
        halved = {name: value / 2 for name, value in self.inner.named_parameters()}
        return call(self.inner, halved, x)


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the expected graphs are those of torch 2.13"
)
class TestExpectedGraphs(TestCase):
    """Written anew by ``make expect``."""

    def setUp(self) -> None:
        self.module, self.x = MLP(), torch.rand(5, 3)
        self.p = state_of(self.module, seed=1)

    def test_compile(self) -> None:
        graphs = capture(lambda p, x: call(self.module, p, x), self.p, self.x).graphs
        self.assertExpectedInline(
            text_of(graphs[0]),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[5, 3]", L_p_l1_weight_: "f32[4, 3]", L_p_l1_bias_: "f32[4]", L_p_l2_weight_: "f32[2, 4]", L_p_l2_bias_: "f32[2]"):
        l_x_ = L_x_
        l_p_l1_weight_ = L_p_l1_weight_
        l_p_l1_bias_ = L_p_l1_bias_
        l_p_l2_weight_ = L_p_l2_weight_
        l_p_l2_bias_ = L_p_l2_bias_
        fcall_body_0 = self.fcall_body_0
        fcall = torch.ops.higher_order.fcall(fcall_body_0, l_p_l1_weight_, l_p_l1_bias_, l_p_l2_weight_, l_p_l2_bias_, l_x_)
        getitem: "f32[5, 2]" = fcall[0]
        return (getitem,)
    class fcall_body_0(torch.nn.Module):
        def forward(self, p_l1_weight: "f32[4, 3]", p_l1_bias: "f32[4]", p_l2_weight: "f32[2, 4]", p_l2_bias: "f32[2]", x: "f32[5, 3]"):
            linear: "f32[5, 4]" = torch._C._nn.linear(x, p_l1_weight, p_l1_bias)
            tanh: "f32[5, 4]" = linear.tanh()
            linear_1: "f32[5, 2]" = torch._C._nn.linear(tanh, p_l2_weight, p_l2_bias)
            out: "f32[5, 2]" = linear_1 * 1.0
            return (out,)
""",
        )

    def test_compile_grad(self) -> None:
        def fn(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            return torch.func.grad(lambda p: call(module, p, x).sum())(p)

        module = nn.Linear(3, 1, bias=False)
        graphs = capture(fn, state_of(module), self.x).graphs
        self.assertExpectedInline(
            text_of(graphs[0]),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, L_p_weight_: "f32[1, 3]", L_x_: "f32[5, 3]"):
        l_p_weight_ = L_p_weight_
        l_x_ = L_x_
        _saved_tensors_hooks_disable = torch._C._autograd._saved_tensors_hooks_disable("torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks. Please open an issue with your use case.")
        _grad_increment_nesting = torch._C._functorch._grad_increment_nesting()
        child: "f32[1, 3]" = torch._C._functorch._wrap_for_grad(l_p_weight_, 1)
        set_inplace_requires_grad_allowed = torch._C._functorch.set_inplace_requires_grad_allowed(True)
        _set_tensor_requires_grad: "f32[1, 3]" = torch._functorch.eager_transforms._set_tensor_requires_grad(child)
        set_inplace_requires_grad_allowed_1 = torch._C._functorch.set_inplace_requires_grad_allowed(False)
        fcall_body_0 = self.fcall_body_0
        fcall = torch.ops.higher_order.fcall(fcall_body_0, child, l_x_)
        getitem: "f32[5, 1]" = fcall[0]
        output: "f32[]" = getitem.sum()
        _autograd_grad = torch._functorch.eager_transforms._autograd_grad((output,), [child], create_graph = True)
        value: "f32[1, 3]" = _autograd_grad[0]
        _unwrap_for_grad: "f32[1, 3]" = torch._functorch.predispatch._unwrap_for_grad(value, 1)
        output_1: "f32[]" = torch._functorch.predispatch._unwrap_for_grad(output, 1)
        _grad_decrement_nesting = torch._C._functorch._grad_decrement_nesting()
        _saved_tensors_hooks_enable = torch._C._autograd._saved_tensors_hooks_enable()
        return (_unwrap_for_grad,)
    class fcall_body_0(torch.nn.Module):
        def forward(self, p_weight: "f32[1, 3]", input_1: "f32[5, 3]"):
            out: "f32[5, 1]" = torch._C._nn.linear(input_1, p_weight, None)
            return (out,)
""",
        )

    def test_export(self) -> None:
        program = torch.export.export(Owner(), (self.x,), strict=False)
        self.assertExpectedInline(
            text_of(program.graph_module),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, p_inner_l1_weight: "f32[4, 3]", p_inner_l1_bias: "f32[4]", p_inner_l2_weight: "f32[2, 4]", p_inner_l2_bias: "f32[2]", x: "f32[5, 3]"):
        div: "f32[4, 3]" = torch.ops.aten.div.Tensor(p_inner_l1_weight, 2)
        div_1: "f32[4]" = torch.ops.aten.div.Tensor(p_inner_l1_bias, 2)
        div_2: "f32[2, 4]" = torch.ops.aten.div.Tensor(p_inner_l2_weight, 2)
        div_3: "f32[2]" = torch.ops.aten.div.Tensor(p_inner_l2_bias, 2)
        fcall_body_0 = self.fcall_body_0
        fcall = torch.ops.higher_order.fcall(fcall_body_0, div, div_1, div_2, div_3, x)
        getitem: "f32[5, 2]" = fcall[0]
        return (getitem,)
    class fcall_body_0(torch.nn.Module):
        def forward(self, p_l1_weight: "f32[4, 3]", p_l1_bias: "f32[4]", p_l2_weight: "f32[2, 4]", p_l2_bias: "f32[2]", x: "f32[5, 3]"):
            linear: "f32[5, 4]" = torch.ops.aten.linear.default(x, p_l1_weight, p_l1_bias)
            tanh: "f32[5, 4]" = torch.ops.aten.tanh.default(linear)
            linear_1: "f32[5, 2]" = torch.ops.aten.linear.default(tanh, p_l2_weight, p_l2_bias)
            mul: "f32[5, 2]" = torch.ops.aten.mul.Tensor(linear_1, 1.0)
            return [mul]
""",
        )

    def test_export_strict(self) -> None:
        program = torch.export.export(Owner(), (self.x,), strict=True)
        self.assertExpectedInline(
            text_of(program.graph_module),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, p_inner_l1_weight: "f32[4, 3]", p_inner_l1_bias: "f32[4]", p_inner_l2_weight: "f32[2, 4]", p_inner_l2_bias: "f32[2]", x: "f32[5, 3]"):
        div: "f32[4, 3]" = torch.ops.aten.div.Tensor(p_inner_l1_weight, 2)
        div_1: "f32[4]" = torch.ops.aten.div.Tensor(p_inner_l1_bias, 2)
        div_2: "f32[2, 4]" = torch.ops.aten.div.Tensor(p_inner_l2_weight, 2)
        div_3: "f32[2]" = torch.ops.aten.div.Tensor(p_inner_l2_bias, 2)
        fcall_body_0 = self.fcall_body_0
        fcall = torch.ops.higher_order.fcall(fcall_body_0, div, div_1, div_2, div_3, x)
        getitem: "f32[5, 2]" = fcall[0]
        return (getitem,)
    class fcall_body_0(torch.nn.Module):
        def forward(self, p_l1_weight: "f32[4, 3]", p_l1_bias: "f32[4]", p_l2_weight: "f32[2, 4]", p_l2_bias: "f32[2]", x: "f32[5, 3]"):
            linear: "f32[5, 4]" = torch.ops.aten.linear.default(x, p_l1_weight, p_l1_bias)
            tanh: "f32[5, 4]" = torch.ops.aten.tanh.default(linear)
            linear_1: "f32[5, 2]" = torch.ops.aten.linear.default(tanh, p_l2_weight, p_l2_bias)
            mul: "f32[5, 2]" = torch.ops.aten.mul.Tensor(linear_1, 1.0)
            return [mul]
""",
        )

    def test_make_fx(self) -> None:
        fn = make_fx(lambda p, x: call(self.module, p, x), pre_dispatch=True)
        self.assertExpectedInline(
            text_of(fn(self.p, self.x)),
            """\
class <lambda>(torch.nn.Module):
    def forward(self, p, x):
        p_1: "f32[4, 3]"; p_2: "f32[4]"; p_3: "f32[2, 4]"; p_4: "f32[2]"; x_1: "f32[5, 3]";
        p_1, p_2, p_3, p_4, x_1, = fx_pytree.tree_flatten_spec([p, x], self._in_spec)
        fcall_body_0 = self.fcall_body_0
        fcall = torch.ops.higher_order.fcall(fcall_body_0, p_1, p_2, p_3, p_4, x_1)
        getitem: "f32[5, 2]" = fcall[0]
        return pytree.tree_unflatten([getitem], self._out_spec)
    class fcall_body_0(torch.nn.Module):
        def forward(self, p_l1_weight: "f32[4, 3]", p_l1_bias: "f32[4]", p_l2_weight: "f32[2, 4]", p_l2_bias: "f32[2]", x: "f32[5, 3]"):
            linear: "f32[5, 4]" = torch.ops.aten.linear.default(x, p_l1_weight, p_l1_bias)
            tanh: "f32[5, 4]" = torch.ops.aten.tanh.default(linear)
            linear_1: "f32[5, 2]" = torch.ops.aten.linear.default(tanh, p_l2_weight, p_l2_bias)
            mul: "f32[5, 2]" = torch.ops.aten.mul.Tensor(linear_1, 1.0)
            return [mul]
""",
        )


STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


def fcall_nodes(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if str(node.target) == "fcall"]


def body_of(graph: GraphModule) -> GraphModule:
    (node,) = fcall_nodes(graph)
    return getattr(graph, node.args[0].target)  # type: ignore[no-any-return]


def export(module: nn.Module, *args: Any, strict: bool, **options: Any) -> ExportedProgram:
    with unchanged(module):
        return torch.export.export(module, args, strict=strict, **options)


class OwnsPartly(Owner):
    """Leaves most of its submodule's tensors in place."""

    def forward(self, x: Tensor) -> Tensor:
        return call(self.inner, {"l1.bias": x[0, 0].expand(4)}, x)


class OwnsNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Normed()

    def forward(self, x: Tensor) -> Tensor:
        doubled = {name: value * 2 for name, value in self.inner.named_parameters()}
        return call(self.inner, doubled, x)


OWNERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "all given": (Owner, torch.rand(5, 3)),
    "a part given": (OwnsPartly, torch.rand(5, 3)),
    "buffers in place": (OwnsNormed, torch.rand(4, 2, 6, 6)),
}


@STRICT
@pytest.mark.parametrize("owner", OWNERS)
def test_exported_programs_run(owner: str, strict: bool) -> None:
    make, x = OWNERS[owner]
    module = make()
    program = export(module, x, strict=strict)
    decomposed = program.run_decompositions()
    assert (len(fcall_nodes(program.graph_module)), fcall_nodes(decomposed.graph_module)) == (1, [])
    for exported in (program.module(), decomposed.module()):
        twin = copy.deepcopy(module)
        for _ in range(2):
            assert_close(exported(x * 2), twin(x * 2))
        for name, buffer in twin.named_buffers():
            assert_close(exported.get_buffer(name), buffer)


def test_routes_are_recorded() -> None:
    module, x = MLP(), torch.rand(5, 3)
    p = state_of(module)
    for record in (
        lambda: make_fx(lambda p, x: call(module, p, x), pre_dispatch=True)(p, x),
        lambda: torch.export.export(Owner(), (x,), strict=False),
    ):
        with fcall.record_routes() as routes:
            record()
        assert [route.kind for route in routes] == ["operator"]


@STRICT
def test_exported_with_a_dynamic_batch(strict: bool) -> None:
    module = Owner()
    shapes = {"x": {0: Dim("batch")}}
    program = export(module, torch.rand(5, 3), strict=strict, dynamic_shapes=shapes)
    assert len(fcall_nodes(program.graph_module)) == 1
    for batch in (2, 7):
        x = torch.rand(batch, 3)
        assert_close(program.module()(x), module(x))


@STRICT
def test_what_is_given_no_value_is_an_operand_too(strict: bool) -> None:
    program = export(OwnsPartly(), torch.rand(5, 3), strict=strict)
    assert not program.constants
    body = body_of(program.graph_module).graph
    names = {node.name for node in body.find_nodes(op="placeholder")}
    assert len(names) == 5
    assert not body.find_nodes(op="get_attr")


def test_what_is_given_no_value_is_an_operand_in_make_fx() -> None:
    module, x = MLP(), torch.rand(5, 3)
    graph = make_fx(lambda p, x: call(module, p, x), pre_dispatch=True)(
        {"l1.bias": torch.ones(4)}, x
    )
    body = body_of(graph)
    names = [node.name for node in body.graph.find_nodes(op="placeholder")]
    assert names == ["p_l1_bias", "p_l1_weight", "p_l2_weight", "p_l2_bias", "x"]
    assert not body.graph.find_nodes(op="get_attr")
    assert_close(
        graph({"l1.bias": torch.zeros(4)}, x), call(module, {"l1.bias": torch.zeros(4)}, x)
    )


def test_make_fx_runs_a_body_once() -> None:
    module, x = Normed(), torch.rand(4, 2, 6, 6)
    p, twin = state_of(module), state_of(module)
    graph = make_fx(lambda p, x: call(module, p, x), pre_dispatch=True)(p, x)
    assert p["norm.num_batches_tracked"] == 1
    expected = call(module, twin, x)
    assert_close(p, twin)
    assert_close(graph(p, x), expected)
    assert p["norm.num_batches_tracked"] == 2


def test_make_fx_of_a_reassigned_buffer() -> None:
    def fn(foo: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        p = {"foo": foo}
        return call(module, p, x), p["foo"]

    module, x = Counter(), torch.rand(2)
    with unchanged(module):
        graph = make_fx(fn, pre_dispatch=True)(torch.tensor(1.0), x)
    assert len(fcall_nodes(graph)) == 1
    assert_close(graph(torch.tensor(5.0), x), (x + 6, torch.tensor(6.0)))


def test_make_fx_without_pre_dispatch_sees_the_operations() -> None:
    module, x = MLP(), torch.rand(5, 3)
    p, other = state_of(module, seed=1), state_of(module, seed=2)
    for fn in (
        lambda p: call(module, p, x),
        torch.func.grad(lambda p: call(module, p, x).square().sum()),
    ):
        graph = make_fx(fn)(p)
        assert not fcall_nodes(graph)
        assert_close(graph(other), fn(other))


def test_placeholders_are_named_after_weights_and_arguments() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, pair: Any, *rest: Tensor, flag: bool, scale: Tensor) -> Tensor:
            return (x + pair[0] * pair[1]["a"] + rest[0] + self.p) * scale

    def fn(p: dict[str, Tensor], t: Tensor) -> Tensor:
        return call(module, p, (t, (t * 2, {"a": t * 3}), t * 4), {"flag": True, "scale": t * 5})

    module, t = Takes(), torch.ones(2)
    names = ["p_p", "x", "pair_0", "pair_1", "args_2", "scale"]
    for graph in (
        capture(fn, {"p": t}, t).graphs[0],
        make_fx(fn, pre_dispatch=True)({"p": t}, t),
    ):
        body = body_of(graph)
        assert [node.name for node in body.graph.find_nodes(op="placeholder")] == names
