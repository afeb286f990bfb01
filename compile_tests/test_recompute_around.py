"""Activation checkpoints in eager calls: what is in force around backward does not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.checkpoints import Checkpointed, Times, in_another_thread, leaf, slope
from compile_tests.support.oracle import assert_close, loaded, unchanged
from fcall.eager.recompute import follow_checkpoints
from fcall.eager.swap import active

either_kind = pytest.mark.parametrize("reentrant", [False, True])


@either_kind
def test_backward_in_a_call_with_other_values(reentrant: bool) -> None:
    module, x, first, second = Checkpointed(Times(), reentrant), leaf(0.3), leaf(0.7), leaf(0.9)
    name = "inner.weight"
    with unchanged(module):
        out = fcall.functional_call(module, {name: first}, (x,))
        with fcall.substitute(module, {name: second}):
            out.backward()
            assert module.inner.weight is second
            module(x).backward()
    assert_close(first.grad, slope(0.7, 0.3))
    assert_close(second.grad, slope(0.9, 0.3))


@either_kind
def test_backward_of_a_plain_call_in_calls_within_calls(reentrant: bool) -> None:
    module, x, name = Checkpointed(Times(0.7), reentrant), leaf(0.3), "inner.weight"
    outer, inner = leaf(0.8), leaf(0.9)
    out = module(x)
    with unchanged(module), fcall.substitute(module, {name: outer}):
        with fcall.substitute(module, {name: inner}):
            out.backward()
            assert module.inner.weight is inner
        assert module.inner.weight is outer
    assert (outer.grad, inner.grad) == (None, None)
    assert_close(module.inner.weight.grad, slope(0.7, 0.3))


@either_kind
def test_substitutions_of_other_modules_around_backward_do_not_count(reentrant: bool) -> None:
    factor = Times(0.5)

    class UsesFactor(Times):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * factor.weight

    module, x, weight = Checkpointed(UsesFactor(), reentrant), leaf(0.3), leaf(0.7)
    out = fcall.functional_call(module, {"inner.weight": weight}, (x,))
    with unchanged(factor), fcall.substitute(factor, {"weight": leaf(9.0)}):
        out.backward()
    assert_close(weight.grad, slope(0.7, 0.3) * 0.5)


@either_kind
def test_substitutions_of_other_modules_around_the_call_count(reentrant: bool) -> None:
    outer, inner = Checkpointed(Times(), reentrant), Checkpointed(Times(), reentrant)
    x, first, second = leaf(0.3), leaf(0.7), leaf(0.9)

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = fcall.functional_call(inner, {"inner.weight": second}, (x,))
            return outer(x)  # type: ignore[no-any-return]

    both = Checkpointed(Both(), reentrant)
    with unchanged(outer), unchanged(inner):
        with fcall.substitute(outer, {"inner.weight": first}):
            out = both(x)
        out.backward()
    expected = torch.autograd.grad((first * (second * x).sin()).sin(), [first, second, x])
    assert_close([first.grad, second.grad, x.grad], list(expected))


@either_kind
def test_backward_in_another_thread(reentrant: bool) -> None:
    module, x, weight = Checkpointed(Times(), reentrant), leaf(0.3), leaf(0.7)
    with unchanged(module):
        out = fcall.functional_call(module, {"inner.weight": weight}, (x,))
        in_another_thread(out.backward)
    assert_close(weight.grad, slope(0.7, 0.3))


@either_kind
def test_backward_in_another_thread_within_the_call(reentrant: bool) -> None:
    """As on the threads that torch's autograd has for each GPU."""

    class Backward(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            in_another_thread(out.backward)
            return out.detach() * self.inner.weight

    module, x, weight = Backward(Times(), reentrant), leaf(0.3), leaf(0.7)
    with unchanged(module):
        out = fcall.functional_call(module, {"inner.weight": weight}, (x,))
    assert_close(weight.grad, slope(0.7, 0.3))
    assert_close(out, (weight * x).sin() * weight)


def test_a_block_that_ends_in_another_thread() -> None:
    module, x, weight = Checkpointed(Times(), False), leaf(0.3), leaf(0.7)
    block = fcall.substitute(module, {"inner.weight": weight})
    with unchanged(module):
        block.__enter__()
        out = module(x)
        in_another_thread(lambda: block.__exit__(None, None, None))
        assert active() == []
        out.backward()
    assert_close(weight.grad, slope(0.7, 0.3))


@either_kind
def test_own_tensors_replaced_before_backward(reentrant: bool) -> None:
    """What had no value is the module's own, as it is in backward: as for a plain module."""
    inner = nn.Sequential(Times(), Times(0.5))
    module, x, weight = Checkpointed(inner, reentrant), leaf(0.3), leaf(0.7)
    out = fcall.functional_call(module, {"inner.0.weight": weight}, (x,))
    twin = loaded(module, {"inner.0.weight": leaf(0.7)})
    of_twin = twin(x)
    for each in (module, twin):
        each.inner[1].weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    out.backward()
    of_twin.backward()
    assert_close(weight.grad, twin.inner[0].weight.grad)
    assert_close(inner[1].weight.grad, twin.inner[1].weight.grad)


@either_kind
def test_an_error_in_backward(reentrant: bool) -> None:
    class FailsAgain(Times):
        failing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.failing:
                raise OverflowError(self.weight.item())
            return super().forward(x)

    module, x = Checkpointed(FailsAgain(), reentrant), leaf(0.3)
    name, other = "inner.weight", leaf(0.9)
    with unchanged(module):
        out = fcall.functional_call(module, {name: leaf(0.7)}, (x,))
        module.inner.failing = True
        with fcall.substitute(module, {name: other}):
            with pytest.raises(OverflowError, match=r"0\.7"):
                out.backward()
            assert module.inner.weight is other
        module.inner.failing = False
        del module.inner.failing


@either_kind
def test_values_that_the_checkpoint_does_not_use(reentrant: bool) -> None:
    module = nn.Sequential(Checkpointed(nn.Identity(), reentrant), Times())
    weight = leaf(0.7)
    x = torch.tensor(0.3, dtype=torch.float64)
    fcall.functional_call(module, {"1.weight": weight}, (x,)).backward()
    assert_close(weight.grad, slope(0.7, 0.3))


@either_kind
def test_saved_on_cpu(reentrant: bool) -> None:
    module, x, weight = Checkpointed(Times(), reentrant), leaf(0.3), leaf(0.7)
    with torch.autograd.graph.save_on_cpu():
        out = fcall.functional_call(module, {"inner.weight": weight}, (x,))
    out.backward()
    assert_close(weight.grad, slope(0.7, 0.3))


def test_hooks_that_read_the_module_see_it_as_it_is() -> None:
    """Documented: what unpacks a saved tensor is not known to belong to a call."""
    module, x, weight = Times(3.0), leaf(0.3), leaf(0.7)
    seen = []

    def unpack(packed: Tensor) -> Tensor:
        seen.append(module.weight.item())
        return packed

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = fcall.functional_call(module, {"weight": weight}, (x,))
    out.backward()
    assert set(seen) == {3.0}
    assert_close(weight.grad, slope(0.7, 0.3))


def test_torch_is_wrapped_once() -> None:
    frame_init = torch.utils.checkpoint._CheckpointFrame.__init__
    apply = torch.utils.checkpoint.CheckpointFunction.__dict__["apply"]
    follow_checkpoints()
    assert torch.utils.checkpoint._CheckpointFrame.__init__ is frame_init
    assert torch.utils.checkpoint.CheckpointFunction.__dict__["apply"] is apply
