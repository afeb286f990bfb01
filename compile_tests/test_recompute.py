"""Activation checkpoints in eager calls: backward computes again with the values of the call."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fcall
from compile_tests.support.checkpoints import (
    WAYS,
    Block,
    expected_gradients,
    gradients,
    network,
    values_for,
)
from compile_tests.support.compiled import check_compiled
from compile_tests.support.oracle import assert_close, unchanged

each_way = pytest.mark.parametrize("way", WAYS)
either_kind = pytest.mark.parametrize("way", ["non-reentrant", "reentrant"])


@each_way
@pytest.mark.parametrize("leaf", [True, False], ids=["leaves", "computed"])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["x needs grad", "x does not"])
def test_gradients(way: str, leaf: bool, needs_grad: bool) -> None:
    module = network(way)
    values, leaves = values_for(module, leaf=leaf)
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=needs_grad)
    expected = expected_gradients(module, values, leaves, x)
    if not leaf:  # backward has gone through what they are computed from
        values = dict(zip(values, [(leaves[-1] * value).sin() for value in leaves[:-1]]))
    with unchanged(module):
        actual = gradients(lambda: fcall.functional_call(module, values, (x,)), [*leaves, x])
    assert_close(actual, expected)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("leaf", [True, False], ids=["leaves", "computed"])
def test_torch_func_is_silently_wrong_without_reentry(leaf: bool) -> None:
    """Should this fail, torch has caught up."""
    module, x = network("non-reentrant"), torch.rand(5, 3, dtype=torch.float64)
    values, leaves = values_for(module)
    (expected, *_) = expected_gradients(module, values, leaves, x)
    (actual, *_) = gradients(lambda: torch.func.functional_call(module, values, (x,)), leaves)
    assert actual is not None
    assert not torch.allclose(actual, expected)


def test_torch_func_gives_no_gradients_with_reentry() -> None:
    """Should this fail, torch has caught up."""
    module, x = network("reentrant"), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    values, leaves = values_for(module)
    actual = gradients(lambda: torch.func.functional_call(module, values, (x,)), leaves)
    assert actual == [None] * len(leaves)
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, composable_checkpoint])
def test_wrappers_of_modules(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module, x = network(None), torch.rand(5, 3, dtype=torch.float64)
    wrapped = copy.deepcopy(module)
    wrapped[1] = wrap(wrapped[1])
    values, leaves = values_for(module)
    expected = expected_gradients(module, values, leaves, x)[:-1]
    values = dict(zip([name for name, _ in wrapped.named_parameters()], values.values()))
    actual = gradients(lambda: fcall.functional_call(wrapped, values, (x,)), leaves)
    assert_close(actual, expected)


def test_checkpoint_imported_before() -> None:
    lines = [
        "import torch",
        "from torch.utils.checkpoint import checkpoint",
        "import fcall",
        "class Block(torch.nn.Linear):",
        "    def forward(self, x):",
        "        return checkpoint(lambda x: super(Block, self).forward(x).sin(), x, "
        "use_reentrant=False)",
        "m, p = Block(1, 1, bias=False), torch.tensor([[2.0]], requires_grad=True)",
        "fcall.functional_call(m, {'weight': p}, torch.ones(1, 1)).sum().backward()",
        "torch.testing.assert_close(p.grad, p.detach().cos())",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_torch_that_keeps_checkpoints_otherwise() -> None:
    lines = [
        "import warnings",
        "import torch.utils.checkpoint as checkpoint",
        "del checkpoint._CheckpointFrame",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        "    import fcall",
        "(warning,) = caught",
        "assert warning.category is fcall.errors.FcallWarning",
        "print(warning.message)",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    for clause in (torch.__version__, "non-reentrant activation checkpoints", "2.11 to 2.15"):
        assert clause in run.stdout


# --- What is done with the gradients ------------------------------------------------------------


@either_kind
def test_several_calls_before_one_backward(way: str) -> None:
    module, x = network(way), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    first, second = values_for(module), values_for(module)
    expected = [expected_gradients(module, *each, x)[:-1] for each in (first, second)]

    def both() -> Tensor:
        outs = []
        for values, _ in (first, second):
            torch.manual_seed(3)
            outs.append(fcall.functional_call(module, values, (x,)))
        return torch.cat(outs)

    actual = gradients(both, [*first[1], *second[1]])
    assert_close(actual, [*expected[0], *expected[1]])


@either_kind
def test_backward_twice(way: str) -> None:
    module, x = network(way), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    values, leaves = values_for(module)
    expected = expected_gradients(module, values, leaves, x)[:-1]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(3)
    loss = fcall.functional_call(module, values, (x,)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close([leaf.grad / 2 for leaf in leaves], expected)


class Forces(nn.Module):
    """Returns the gradient of an energy: backward in the forward, and again after it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.energy = Block(way)

    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("way", ["non-reentrant", "without early stop", "nested", "sequential"])
def test_forces(way: str) -> None:
    module = Forces(way).double()
    values, leaves = values_for(module)
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    expected = expected_gradients(module, values, leaves, x)
    with unchanged(module):
        actual = gradients(lambda: fcall.functional_call(module, values, (x,)), [*leaves, x])
    assert_close(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, fcall.func.grad])
def test_transforms_refuse_checkpoints_as_for_a_plain_module(transform: Any) -> None:
    module, x = network("non-reentrant"), torch.rand(5, 3, dtype=torch.float64)
    values, _ = values_for(module)
    for call in (lambda p: module(x), lambda p: fcall.functional_call(module, p, (x,))):
        with pytest.raises(RuntimeError, match="saved tensor hooks"), unchanged(module):
            transform(lambda p, call=call: call(p).sum())(values)


@pytest.mark.compiled
@either_kind
def test_compiled(way: str) -> None:
    module, x = network(way, dropout=0.0), torch.rand(5, 3, dtype=torch.float64)
    values, _ = values_for(module)
    check_compiled(
        lambda p, x: fcall.functional_call(module, p, (x,)),
        values,
        x.requires_grad_(),
        module=module,
    )


@pytest.mark.compiled
def test_compiled_block_in_a_checkpoint() -> None:
    module, x = network("non-reentrant", dropout=0.0), torch.rand(5, 3, dtype=torch.float64)
    values, leaves = values_for(module)
    expected = expected_gradients(module, values, leaves, x)[:-1]
    for block in module:
        block.compute = torch.compile(block.compute, backend="aot_eager")
    actual = gradients(lambda: fcall.functional_call(module, values, (x,)), leaves)
    assert_close(actual, expected)


# --- What is kept -------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@each_way
@pytest.mark.usefixtures("no_collection")
def test_backward_keeps_no_values(way: str) -> None:
    module, x = network(way), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    values = values_for(module, leaf=False)[0]
    references = [weakref.ref(value) for value in values.values()]
    fcall.functional_call(module, values, (x,)).sum().backward()
    del values
    assert [reference() for reference in references] == [None] * len(references)


@either_kind
@pytest.mark.usefixtures("no_collection")
def test_no_backward_keeps_no_values(way: str) -> None:
    module, x = network(way), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    values = values_for(module)[0]
    references = [weakref.ref(value) for value in values.values()]
    fcall.functional_call(module, values, (x,))
    del values
    assert [reference() for reference in references] == [None] * len(references)
