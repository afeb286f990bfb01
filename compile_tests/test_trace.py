"""``fcall.trace``: a pure graph, called with the weights and the inputs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

import fcall
from compile_tests.support.models import EXAMPLES, MLP, Counter, Normed, Tied
from compile_tests.support.oracle import (
    assert_close,
    in_float64,
    loaded,
    state_of,
    unchanged,
)
from compile_tests.support.threads import run
from fcall import errors

pytestmark = pytest.mark.compiled

X = torch.rand(4, 3)


def placeholders(program: fcall.Program) -> list[str]:
    return [node.name for node in program.graph_module.graph.find_nodes(op="placeholder")]


def traced_mlp(**options: Any) -> tuple[nn.Module, fcall.Program]:
    module = MLP()
    return module, fcall.trace(module, state_of(module), X, **options)


def on_float32(module: nn.Module, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return loaded(module, values)(*in_float64(args), **kwargs)


# --- the graph and what it computes -------------------------------------------------------------


@pytest.mark.parametrize("form", ["traced", "in core operators", "exported"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_model(name: str, form: str) -> None:
    module, x = EXAMPLES[name]()
    p = state_of(module)
    with unchanged(module):
        program = fcall.trace(module, p, (x,))
    assert_close(p, state_of(module))  # examples are not mutated
    assert program.names == tuple(p)
    assert placeholders(program)[:-1] == ["p_" + n.replace(".", "_") for n in p]
    values, twin = state_of(module, seed=1), loaded(module, state_of(module, seed=1))
    expected = twin(in_float64(x))
    if form == "exported":
        out, state = program.exported().module()(values, x)
        values |= state
    else:
        out = (program if form == "traced" else program.decompose())(values, x)
    assert_close(out, expected, dtype=torch.float32)
    assert_close(values, dict((*twin.named_parameters(), *twin.named_buffers())))


def test_names_and_order_are_free() -> None:
    module, program = traced_mlp()
    p = state_of(module, seed=1)
    expected = on_float32(module, p, X)
    backwards = dict(reversed(p.items()))
    parts = [{name: nn.Parameter(value)} for name, value in p.items()]
    for given in (p, backwards, parts):
        assert_close(program(given, X), expected, dtype=torch.float32)


def test_ties_are_one_input() -> None:
    module = Tied()
    own = dict(module.named_parameters(remove_duplicate=False))
    x = torch.randint(0, 5, (3,))
    for given in (own, dict(module.named_parameters())):
        program = fcall.trace(module, given, x)
        tied = [spec for spec in program.signature.inputs if spec.tied]
        assert len(tied) == 1
        names = [tied[0].name, *tied[0].tied]
        values = state_of(module, seed=1)
        expected = on_float32(module, values, x)
        value = values.pop(next(name for name in names if name in values))
        for name in names:
            assert_close(program({**values, name: value}, x), expected, dtype=torch.float32)
        assert_close(
            program({**values, **dict.fromkeys(names, value)}, x), expected, dtype=torch.float32
        )
        with pytest.raises(errors.TiedValuesError, match=names[0]):
            program({**values, names[0]: value, names[1]: value.clone()}, x)


def test_ties_can_be_untied() -> None:
    module = Tied()
    names = dict(module.named_parameters(remove_duplicate=False))
    values = {name: torch.rand_like(value) for name, value in names.items()}
    x = torch.randint(0, 5, (3,))
    program = fcall.trace(module, values, x, tie_weights=False)
    assert set(program.names) == set(names)
    expected = fcall.functional_call(module, values, x, tie_weights=False)
    assert_close(program(values, x), expected)


@pytest.mark.parametrize("method", [None, "encode"])
def test_methods_and_keywords(method: str | None) -> None:
    module = MLP()
    kwargs = {} if method else {"scale": 2.0}
    program = fcall.trace(module, state_of(module), X, kwargs, method=method)
    values = state_of(module, seed=1)
    expected = fcall.functional_call(module, values, X, kwargs, method=method)
    assert_close(program(values, X, **kwargs), expected)


def test_sizes_may_vary() -> None:
    module, program = traced_mlp(dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}})
    p = state_of(module, seed=1)
    for form in (program, program.decompose()):
        for count in (2, 3, 64):
            x = torch.rand(count, 3)
            assert_close(form(p, x), on_float32(module, p, x), dtype=torch.float32)
        for count in (1, 65):
            with pytest.raises(errors.ProgramInputsError, match=f"2 to 64, and is {count}"):
                form(p, torch.rand(count, 3))


def test_sizes_that_belong_together() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return super().forward(x) + y + z.sum()

    module, batch = Two(3, 3), Dim("batch")
    examples = torch.rand(4, 3), torch.rand(4, 3), torch.rand(8)
    sizes = {"x": {0: batch}, "y": {0: batch}, "z": {0: 2 * batch}}
    program = fcall.trace(module, state_of(module), examples, dynamic_shapes=sizes)
    p = state_of(module, seed=1)
    given = torch.rand(5, 3), torch.rand(5, 3), torch.rand(10)
    assert_close(program(p, *given), on_float32(module, p, *given), dtype=torch.float32)
    with pytest.raises(errors.ProgramInputsError, match=r"^.*\n\ty: expected"):
        program(p, given[0], torch.rand(6, 3), given[2])
    with pytest.raises(errors.ProgramInputsError, match="has to be 10, not 9"):
        program(p, *given[:2], torch.rand(9))


# --- state --------------------------------------------------------------------------------------


def test_what_is_left_out_has_defaults() -> None:
    module = Normed().train()
    x = torch.rand(4, 2, 6, 6)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    program = fcall.trace(module, params, x)
    before = state_of(module)
    own = {name: before[name] for name in dict(module.named_buffers())}
    with torch.no_grad():  # what the module does later is its own affair
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    values = {name: value for name, value in state_of(module, seed=1).items() if name in params}
    expected = on_float32(module, {**values, **own}, x)
    for _ in range(2):  # a call leaves the defaults as they are
        assert_close(program(values, x), expected, dtype=torch.float32)
    assert {spec.name for spec in program.signature.inputs if spec.has_default} == set(own)


@pytest.mark.parametrize("bake_rest", [False, True])
def test_the_rest_can_be_baked(bake_rest: bool) -> None:
    module = Normed().eval()
    x = torch.rand(4, 2, 6, 6)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    program = fcall.trace(module, params, x, bake_rest=bake_rest)
    assert set(program.names) == {*params, *([] if bake_rest else dict(module.named_buffers()))}
    values = {name: value for name, value in state_of(module, seed=1).items() if name in params}
    for form in (program, program.decompose()):
        assert_close(form(values, x), on_float32(module, values, x), dtype=torch.float32)


def test_changed_state_cannot_be_baked() -> None:
    module = Normed().train()
    with pytest.raises(errors.BakedStateError, match="running_mean"):
        fcall.trace(module, dict(module.named_parameters()), torch.rand(4, 2, 6, 6), bake_rest=True)


def test_changes_are_told() -> None:
    module, x = EXAMPLES["Counter"]()
    program = fcall.trace(module, state_of(module), x)
    changed = {spec.name: spec.changed for spec in program.signature.inputs if spec.changed}
    assert set(changed.values()) <= {"in place", "reassigned"}
    values = state_of(module, seed=1)
    before = {name: (value, value.clone()) for name, value in values.items()}
    program(values, x)
    for name, (value, copied) in before.items():
        assert (values[name] is not value) == (changed.get(name) == "reassigned")
        assert (not torch.equal(value, copied)) == (changed.get(name) == "in place")
    assert changed


def test_nothing_of_the_module_stays_alive() -> None:
    module = nn.Sequential(Counter(), MLP()).eval()
    module.plain = torch.rand(3)
    storages = [weakref.ref(t.untyped_storage()) for t in (*module.parameters(), *module.buffers())]
    modules = [weakref.ref(m) for m in module.modules()]
    program = fcall.trace(module, dict(module[1].named_parameters(prefix="1")), X)
    values = {
        name: torch.ones(spec.shape) for name, spec in zip(program.names, program.signature.inputs)
    }
    del module
    gc.collect()
    assert not any(reference() for reference in (*storages, *modules))
    assert program(values, X).shape == (4, 2)


# --- where it can be used -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_transforms() -> None:
    module, program = traced_mlp()
    p = {name: value.double() for name, value in state_of(module, seed=1).items()}
    module, x = module.double(), X.double()
    program = fcall.trace(module, p, x)

    def loss_of(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda p, x: call(p, x).square().sum()

    def plain(p: Any, x: Tensor) -> Tensor:
        return fcall.functional_call(module, p, x)

    stacked = {name: torch.stack([value, value * 2, -value]) for name, value in p.items()}
    for transform, arguments in [
        (lambda f: fcall.func.grad(loss_of(f)), (p, x)),
        (lambda f: fcall.func.vmap(f, in_dims=(0, None)), (stacked, x)),
        (lambda f: lambda p, x: fcall.func.jvp(lambda p: f(p, x), (p,), (p,)), (p, x)),
        (lambda f: fcall.func.jacrev(f), (p, x)),
        (lambda f: fcall.func.hessian(lambda x: loss_of(f)(p, x)), (x,)),
        (
            lambda f: fcall.func.vmap(fcall.func.grad(loss_of(f)), in_dims=(0, None)),
            (stacked, x),
        ),
    ]:
        expected = transform(plain)(*arguments)
        assert_close(transform(program)(*arguments), expected)
        compiled = torch.compile(transform(program), backend="aot_eager", fullgraph=True)
        assert_close(compiled(*arguments), expected)


def test_compiled() -> None:
    module, program = traced_mlp(dynamic_shapes={"x": {0: Dim("batch")}})
    compiled = torch.compile(lambda p, x: program(p, x), backend="aot_eager", fullgraph=True)
    for seed in range(3):
        p = state_of(module, seed=seed)
        assert_close(compiled(p, X), on_float32(module, p, X), dtype=torch.float32)


def test_threads() -> None:
    module, x = EXAMPLES["Normed"]()
    module.train()
    program = fcall.trace(module, state_of(module), x)

    def call(seed: int) -> Callable[[], None]:
        def check() -> None:
            for _ in range(20):
                values = state_of(module, seed=seed)
                twin = loaded(module, values)
                assert_close(program(values, x), twin(in_float64(x)), dtype=torch.float32)
                assert_close(values, dict((*twin.named_parameters(), *twin.named_buffers())))

        return check

    run(*[call(seed) for seed in range(8)])


def test_a_large_module_on_meta() -> None:
    """70 billion parameters, of which none is in memory."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(8192, 64, 28672, batch_first=True) for _ in range(2)]
        module = nn.Sequential(*layers, nn.Linear(8192, 7_500_000))
        x = torch.empty(1, 16, 8192)
    count = sum(p.numel() for p in module.parameters())
    assert count > 60e9
    program = fcall.trace(module, dict(module.named_parameters()), x)
    assert program({**dict(module.named_parameters())}, x).shape == (1, 16, 7_500_000)


def test_fake_tensors() -> None:
    module = MLP()
    shapes = {name: value.shape for name, value in state_of(module).items()}

    def fakes() -> tuple[dict[str, Tensor], Tensor]:
        with FakeTensorMode():
            return {name: torch.empty(shape) for name, shape in shapes.items()}, torch.empty(4, 3)

    program = fcall.trace(module, *fakes())
    p = state_of(module, seed=1)
    assert_close(program(p, X), on_float32(module, p, X), dtype=torch.float32)
    values, x = fakes()
    with x.fake_mode:  # type: ignore[attr-defined]
        assert program(values, x).shape == (4, 2)


def test_on_another_device() -> None:
    class Sums(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.arange(2, device=x.device)

    module = Sums(3, 2)
    on_meta = copy.deepcopy(module).to("meta")
    traced = fcall.trace(on_meta, dict(on_meta.named_parameters()), X.to("meta"))
    program = traced.to("cpu")
    p = state_of(module, seed=1)
    assert_close(program(p, X), on_float32(module, p, X), dtype=torch.float32)
    with pytest.raises(errors.ProgramInputsError, match="on meta, given"):
        traced(p, X)


# --- the backward, and passes -------------------------------------------------------------------


def _squares(out: Any) -> Tensor:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return sum(leaf.square().sum() for leaf in leaves if leaf.is_floating_point())


@pytest.mark.parametrize("name", EXAMPLES)
def test_joint(name: str) -> None:
    module, x = EXAMPLES[name]()
    module, x = module.double(), in_float64(x)
    program = fcall.trace(module, state_of(module), x).joint(_squares)
    values, twin = state_of(module, seed=1), loaded(module, state_of(module, seed=1))
    parameters = dict(twin.named_parameters())
    loss, found = program(values, x)
    expected = _squares(twin(x))
    assert_close(loss, expected)
    assert found.keys() == parameters.keys()
    if parameters:
        gradients = torch.autograd.grad(expected, [*parameters.values()], materialize_grads=True)
        assert_close(found, dict(zip(parameters, gradients)))
    assert_close(values, dict((*twin.named_parameters(), *twin.named_buffers())))


def test_joint_with_targets() -> None:
    module, program = traced_mlp(dynamic_shapes={"x": {0: Dim("batch")}})
    joint = program.joint(nn.functional.mse_loss, targets=(torch.rand(4, 2),), names=["l2.bias"])
    p, x, y = state_of(module, seed=1), torch.rand(7, 3), torch.rand(7, 2)
    twin = loaded(module, p)
    expected = nn.functional.mse_loss(twin(x.double()), y.double())
    [gradient] = torch.autograd.grad(expected, [twin.l2.bias])
    assert_close(joint(p, x, y), (expected, {"l2.bias": gradient}), dtype=torch.float32)
    nodes = [node.name for node in joint.graph_module.graph.nodes]
    assert "grad_p_l2_bias" in nodes
    assert placeholders(joint)[-2:] == ["x", "target_0"]


def test_joint_of_what_has_no_gradient() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(torch.rand(3))
            self.unused = nn.Parameter(torch.rand(3))
            self.detached = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.used * x).sum() + self.detached.detach().sum()

    module = Odd()
    p = state_of(module, seed=1)
    loss, gradients = fcall.trace(module, p, torch.ones(3)).joint()(p, torch.ones(3) * 2)
    assert_close(loss, p["used"].sum() * 2 + p["detached"].sum())
    zeros = torch.zeros(3)
    assert_close(gradients, {"used": zeros + 2, "unused": zeros, "detached": zeros})


def test_a_loss_is_one_number() -> None:
    _, program = traced_mlp()
    with pytest.raises(errors.LossError, match=r"float32 with the shape \(4, 2\)"):
        program.joint()
    with pytest.raises(errors.LossError, match="a float"):
        program.joint(lambda out: 1.0)
    with pytest.raises(errors.UnexpectedWeightsError, match=r"'l1.wieght' \(did you mean"):
        program.joint(lambda out: out.sum(), names=["l1.wieght"])


def test_a_pass() -> None:
    """Of torch.fx, over a copy of the graph."""
    module, program = traced_mlp()
    graph_module = copy.deepcopy(program.graph_module)
    for node in graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.tanh.default
    ):
        node.target = torch.ops.aten.relu.default
    changed = program.with_graph(graph_module)
    p = state_of(module, seed=1)
    twin = loaded(module, p)
    expected = twin.l2(twin.l1(X.double()).relu())
    assert_close(changed(p, X), expected, dtype=torch.float32)
    assert_close(changed.decompose()(p, X), expected, dtype=torch.float32)
    assert_close(program(p, X), twin(X.double()), dtype=torch.float32)


def test_a_pass_that_goes_too_far() -> None:
    _, program = traced_mlp()
    graph_module = copy.deepcopy(program.graph_module)
    [output] = graph_module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *output.args[0]),)
    with pytest.raises(errors.GraphChangedError, match="2 outputs, expected 1"):
        program.with_graph(graph_module)
    graph_module = copy.deepcopy(program.graph_module)
    graph_module.graph.placeholder("more")
    with pytest.raises(errors.GraphChangedError, match="'more'"):
        program.with_graph(graph_module)


# --- what it is, and what it refuses ------------------------------------------------------------


def test_the_signature() -> None:
    module = MLP()
    sizes = {"x": {0: Dim("batch", min=2)}, "scale": None}
    program = fcall.trace(module, state_of(module), X, {"scale": 2.0}, dynamic_shapes=sizes)
    weight, *_, x, scale = program.signature.inputs
    assert (weight.name, weight.placeholder, weight.kind) == (
        "l1.weight",
        "p_l1_weight",
        "parameter",
    )
    assert (weight.shape, weight.dtype) == (tuple(module.l1.weight.shape), torch.float32)
    assert str(x) == f"({x.shape[0]}, 3) float32 on cpu"
    assert program.signature.ranges[str(x.shape[0])] == (2, None)
    assert (scale.kind, scale.value) == ("constant", 2.0)
    assert fcall.Signature.from_json(program.signature.to_json()) == program.signature
    assert "p_l1_weight" in repr(program)
    assert "p_l1_weight" in program.print_readable()


class Nested(nn.Module):
    def forward(self, x: Tensor, more: dict[str, Any], *, power: int = 1) -> Tensor:
        return x**power + more["y"][0]


def test_inputs_by_the_names_of_placeholders() -> None:
    args, kwargs = (X, {"y": [X + 1, None]}), {"power": 2}
    signature = fcall.trace(Nested(), {}, args, kwargs).signature
    inputs = {"more_y_0": args[1]["y"][0], "x": X}
    found_args, found_kwargs = signature.unflatten(inputs)
    assert found_args[0] is X
    assert found_args[1]["y"] == [inputs["more_y_0"], None]
    assert found_kwargs == kwargs
    flat = signature.flatten({}, found_args, found_kwargs, {})
    assert [flat[0] is X, *flat[1:]] == [True, inputs["more_y_0"], None, 2]
    with pytest.raises(errors.ProgramInputsError) as caught:
        signature.unflatten({"x": X, "more_y": X, "power": X})
    lines = (
        "more_y_0: not given\n\tmore_y: not known (did you mean 'more_y_0'?)\n\tpower: not known"
    )
    assert str(caught.value).endswith(lines)


def test_what_does_not_fit_is_refused_by_name() -> None:
    module = MLP()
    program = fcall.trace(module, state_of(module), X, {"scale": 2.0})
    p = state_of(module)

    def refused(error: Any, *clauses: str, given: Any = p, args: Any = (X,), **kwargs: Any) -> None:
        with pytest.raises(error) as info:
            program(given, *args, **{"scale": 2.0, **kwargs})
        for clause in clauses:
            assert clause in str(info.value)

    inputs = errors.ProgramInputsError
    wrong = {**p, "l1.weight": torch.rand(3, 3), "l2.bias": torch.rand(2).double()}
    refused(
        inputs, "MLP", "\n\tl1.weight: expected (4, 3) float32 on cpu, given (3, 3)", given=wrong
    )
    refused(inputs, "\n\tl2.bias: expected (2,) float32 on cpu, given (2,) float64", given=wrong)
    refused(inputs, "x: expected (4, 3) float32 on cpu, given (5, 3)", args=(torch.rand(5, 3),))
    refused(inputs, "scale: expected 2.0, given 3.0", scale=3.0)
    refused(inputs, "scale: expected 2.0, given 2", scale=2)
    refused(inputs, "x: expected (4, 3) float32 on cpu, given a str", args=("text",))
    refused(errors.ProgramStructureError, "(params, *, scale=*)", "[*, *]", args=([X, X],))
    refused(errors.ProgramStructureError, "more=*", more=X)
    refused(errors.UnexpectedWeightsError, "'l1.wieght' (did you mean", given={"l1.wieght": X})
    del p["l2.bias"]
    refused(errors.MissingWeightsError, "['l2.bias']", given=p)
