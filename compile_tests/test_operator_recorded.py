"""The operator under ``torch.export`` and ``make_fx``: what is recorded, and how it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fcall
from compile_tests.support.graphs import body_of, fcall_nodes
from compile_tests.support.models import MLP, Counter, Normed, Owner
from compile_tests.support.oracle import assert_close, state_of, unchanged

pytestmark = pytest.mark.compiled

call = fcall.functional_call

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


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


class OwnsEnsemble(Owner):
    def forward(self, x: Tensor) -> Tensor:
        p = {name: torch.stack([v, v * 2]) for name, v in self.inner.named_parameters()}
        return torch.func.vmap(lambda p: call(self.inner, p, x))(p)


class OwnsDerivative(Owner):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = dict(self.inner.named_parameters())
        return torch.func.jvp(lambda p: call(self.inner, p, x), (p,), (p,))


@STRICT
@pytest.mark.parametrize("make", [OwnsEnsemble, OwnsDerivative])
def test_exported_transforms(make: Callable[[], nn.Module], strict: bool) -> None:
    module, x = make(), torch.rand(5, 3)
    program = export(module, x, strict=strict)
    for exported in (program.module(), program.run_decompositions().module()):
        assert_close(exported(x * 2), module(x * 2))


def line_of_tanh(graph: Graph) -> str:
    (tanh,) = [node for node in graph.nodes if "tanh" in str(node.target)]
    return str(tanh.meta["stack_trace"])


@STRICT
def test_exported_operations_tell_where_they_come_from(strict: bool) -> None:
    program = export(Owner(), torch.rand(5, 3), strict=strict).run_decompositions()
    assert "return self.l2(self.encode(x)) * scale" in line_of_tanh(program.graph)


def test_compiled_operations_tell_where_they_come_from() -> None:
    def compiler(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        lines.append(line_of_tanh(graph.graph))
        return graph

    torch._dynamo.reset()
    module, lines = MLP(), []
    backend = aot_autograd(fw_compiler=compiler)
    torch.compile(lambda p, x: call(module, p, x), backend=backend)(
        state_of(module), torch.rand(5, 3)
    )
    assert ["return self.l1(x).tanh()" in line for line in lines] == [True]


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
