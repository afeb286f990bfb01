"""What captured graphs look like."""

# ruff: noqa: E501
from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fcall
from compile_tests.support.compiled import capture
from compile_tests.support.graphs import body_of, text_of
from compile_tests.support.models import MLP, Owner
from compile_tests.support.oracle import state_of

pytestmark = pytest.mark.compiled

call = fcall.functional_call


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
