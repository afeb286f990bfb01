"""``fcall.compile``: one compiled graph for any number of weight sets."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fcall
from compile_tests.support.compiled import backward, fresh, gradients, recording
from compile_tests.support.models import EXAMPLES, MLP, Counter, Normed, Tied
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_model(name: str) -> None:
    module, x = EXAMPLES[name]()
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend)
    with unchanged(module):
        for seed in range(3):
            p = {
                n: v.requires_grad_(v.is_floating_point())
                for n, v in state_of(module, seed=seed).items()
            }
            for buffer, _ in module.named_buffers():
                p[buffer].requires_grad_(False)
            same = fresh(p)
            out, expected = fn(p, x), fcall.functional_call(module, same, x)
            backward(out)
            backward(expected)
            assert_close(out, expected)
            assert_close(p, same)  # buffers written in place or replaced
            assert_close(gradients(p), gradients(same))
    assert len(graphs) == 1


def test_arguments() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    twin, x64 = loaded(module, p), in_float64(x)
    fn = fcall.compile(module, backend="aot_eager")
    assert_close(fn(p, x), twin(x64))
    assert_close(fn(p, x, scale=2.0), twin(x64, scale=2.0))
    assert_close(fn(p, x=x), twin(x64))
    first, second = dict(list(p.items())[:2]), dict(list(p.items())[2:])
    assert_close(fn([first, second], x), twin(x64))
    assert_close(fn((first, second), x), twin(x64))


def test_an_argument_may_be_called_as_ours_are() -> None:
    class Takes(nn.Linear):
        def forward(self, args: Tensor, weights: Tensor, **kwargs: Tensor) -> Tensor:
            return super().forward(args) + weights + kwargs["module"]

    module, t = Takes(2, 2), torch.ones(2)
    fn = fcall.compile(module, backend="aot_eager")
    p = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert_close(fn(p, args=t, weights=t, module=t), torch.full((2,), 4.0))


def test_another_method() -> None:
    module, x = EXAMPLES["MLP"]()
    module.register_forward_hook(lambda m, args, out: out * 100)
    p = state_of(module, seed=1)
    encode = fcall.compile(module, method="encode", backend="aot_eager")
    assert_close(encode(p, x), loaded(module, p).encode(in_float64(x)))


def test_hooks_run() -> None:
    module, x = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    module.register_forward_hook(lambda m, args, out: out * 100)
    fn = fcall.compile(module, backend="aot_eager")
    assert_close(fn(p, x), loaded(module, p)(in_float64(x)))


def test_a_part_of_the_weights() -> None:
    module, x = EXAMPLES["MLP"]()
    fn = fcall.compile(module, backend="aot_eager")
    p = {"l2.bias": torch.ones(2)}
    assert_close(fn(p, x), fcall.functional_call(module, p, x))


def test_reassigned_state_goes_to_the_dict_it_came_in() -> None:
    class Counting(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.counter = Counter()

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return super().forward(self.counter(x), scale=scale)

    module = Counting()
    buffers = {"counter.foo": torch.tensor(3.0)}
    given = buffers["counter.foo"]
    fn = fcall.compile(module, backend="aot_eager")
    params = {n: v.detach() for n, v in module.named_parameters()}
    for step in (4.0, 5.0):
        fn([params, buffers], torch.rand(2, 3))
        assert_close(buffers, {"counter.foo": torch.tensor(step)})
    assert given == 3
    assert params.keys() == dict(module.named_parameters()).keys()


@pytest.mark.parametrize(("dynamic", "compilations"), [(True, 1), (False, 3), (None, 2)])
def test_dynamic_shapes(dynamic: bool | None, compilations: int) -> None:
    module, _ = EXAMPLES["MLP"]()
    backend, graphs = recording()
    fn = fcall.compile(module, backend=backend, dynamic=dynamic)
    p = state_of(module, seed=1)
    for batch in (5, 7, 11):
        x = torch.rand(batch, 3)
        assert_close(fn(p, x), loaded(module, p)(in_float64(x)))
    assert len(graphs) == compilations


def test_a_mode_reaches_the_backend() -> None:
    seen = []

    def backend(graph: GraphModule, inputs: list[Tensor], *, mode: str) -> Any:
        seen.append(mode)
        return graph

    module, x = EXAMPLES["MLP"]()
    fn = fcall.compile(module, backend=backend, mode="swift")
    for _ in range(2):
        assert_close(fn(state_of(module), x), module(x))
    assert seen == ["swift"]


def test_options_reach_the_backend() -> None:
    seen = []

    def backend(graph: GraphModule, inputs: list[Tensor], *, options: Any) -> Any:
        seen.append(options)
        return graph

    fn = fcall.compile(MLP(), backend=backend, options={"a": 1})
    fn(state_of(MLP()), torch.rand(2, 3))
    assert seen == [{"a": 1}]
    with pytest.raises(RuntimeError, match="mode"):
        fcall.compile(MLP(), mode="default", options={"a": 1})


def test_what_is_wrong_is_said() -> None:
    module, x = EXAMPLES["MLP"]()
    with pytest.raises(fcall.errors.UnknownMethodError, match=r"no method 'encod'.*'encode'\?"):
        fcall.compile(module, method="encod", backend="aot_eager")(state_of(module), x)
    tied = Tied()
    values = {"embed.weight": torch.rand(7, 4), "out.weight": torch.rand(7, 4)}
    with pytest.raises(fcall.errors.TiedValuesError, match="tied in Tied"):
        fcall.compile(tied, backend="aot_eager")(values, torch.arange(3))


def test_the_module_is_compiled_as_it_is_now() -> None:
    module, x = Normed(), torch.rand(4, 2, 6, 6)
    fn = fcall.compile(module, backend="aot_eager")
    outs = []
    for mode in (True, False):
        module.train(mode)
        p, same = state_of(module), state_of(module)
        outs.append(fn(p, x))
        assert_close(outs[-1], fcall.functional_call(module, same, x))
        assert p["norm.num_batches_tracked"] == int(mode)
    assert not torch.allclose(*outs)


def test_it_says_what_it_is() -> None:
    fn = fcall.compile(MLP(), method="encode")
    assert isinstance(fn, fcall.CompiledCall)
    assert repr(fn) == "fcall.compile(MLP, method='encode')"
    assert isinstance(fn.module, MLP)


def test_the_module_is_freed_with_the_callable() -> None:
    module = MLP()
    fn = fcall.compile(module, backend="aot_eager")
    fn(state_of(module), torch.rand(2, 3))
    alive = weakref.ref(module)
    del module
    assert alive() is not None
    del fn
    gc.collect()
    assert alive() is None


def test_more_modules_than_dynamo_compiles_one_function_for() -> None:
    backend, graphs = recording("eager")
    count = torch._dynamo.config.recompile_limit + 2
    x = torch.rand(2, 3)
    for depth in range(1, count + 1):
        module = nn.Sequential(nn.Linear(3, 3), *[nn.Tanh()] * depth)
        fn = fcall.compile(module, backend=backend)
        assert_close(fn(state_of(module), x), module(x))
    assert len(graphs) == count
