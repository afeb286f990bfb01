"""`fcall.substitute`: one substitution round several calls, with the promises of one call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import capture, fresh
from compile_tests.support.models import EXAMPLES, MLP, Counter, Recurrent, Tied, parametrized
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.random_modules import Rebuilt


@pytest.mark.parametrize("name", EXAMPLES)
def test_several_calls(name: str) -> None:
    module, x = EXAMPLES[name]()
    values = state_of(module, seed=1)
    twin = loaded(module, values).to(torch.float32)
    with unchanged(module):
        with fcall.substitute(module, values) as substituted:
            assert substituted is module
            out = [module(x), module(x)]
        assert_close(out, [twin(x), twin(x)])
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for key in values:
        assert_close(values[key], state[key].detach())


def test_other_methods_and_reading() -> None:
    module, x = MLP(), torch.rand(2, 3)
    values = state_of(module, seed=1)
    with unchanged(module), fcall.substitute(module, values):
        assert module.l1.weight is values["l1.weight"]
        encoded = module.encode(x)
    assert_close(encoded, loaded(module, values).encode(x.double()))


def test_reassigned_state_is_written_back_when_the_block_ends() -> None:
    module = Counter()
    given = [{}, {"foo": torch.tensor(4.0)}]
    with unchanged(module), fcall.substitute(module, given):
        module(torch.ones(()))
        assert module(torch.ones(())) == 7
        assert given[1]["foo"] == 4
    assert given[1]["foo"] == 6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_block(error: type[BaseException]) -> None:
    module, given = Counter(), {"foo": torch.tensor(4.0)}

    def block() -> None:
        with fcall.substitute(module, given):
            module(torch.ones(()))
            raise error

    with unchanged(module), pytest.raises(error):
        block()
    assert given["foo"] == 5


def test_nested() -> None:
    module = Counter()
    outer, inner = {"foo": torch.tensor(10.0)}, {"foo": torch.tensor(20.0)}
    with unchanged(module), fcall.substitute(module, outer):
        with fcall.substitute(module, inner):
            assert module(torch.zeros(())) == 21
        assert module(torch.zeros(())) == 11
        assert fcall.functional_call(module, {"foo": torch.zeros(())}, torch.zeros(())) == 1
    assert (outer["foo"], inner["foo"]) == (11, 21)


def test_ties_and_strictness() -> None:
    module = Tied()
    weight = torch.rand(7, 4)
    with unchanged(module):
        with fcall.substitute(module, {"embed.weight": weight}):
            assert module.out.weight is weight
        with fcall.substitute(module, {"embed.weight": weight}, tie_weights=False):
            assert module.out.weight is not weight
        with pytest.raises(fcall.errors.TiedValuesError):
            fcall.substitute(
                module, {"embed.weight": weight, "out.weight": weight.clone()}
            ).__enter__()
        with pytest.raises(fcall.errors.StrictKeysError):
            fcall.substitute(module, {"embed.weight": weight}, strict=True).__enter__()


def test_a_parametrization_is_bypassed() -> None:
    module, weight = parametrized(), torch.rand(3, 3)
    with unchanged(module), fcall.substitute(module, {"0.weight": weight}):
        assert module[0].weight is weight


def test_gradients_flow_to_the_values() -> None:
    module, x = MLP(), torch.rand(2, 3)
    values = {name: value.requires_grad_() for name, value in state_of(module, seed=1).items()}
    with fcall.substitute(module, values):
        loss = module(x).sum() + module.l1.weight.square().sum()
    loss.backward()
    assert all(value.grad is not None for value in values.values())
    assert all(p.grad is None for p in module.parameters())


def _two_calls(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    with fcall.substitute(module, values):
        first = module(x)
        return module(x) - 2 * first


@pytest.mark.compiled
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "PythonState"])
def test_in_a_compiled_function(name: str) -> None:
    module, x = EXAMPLES[name]()
    values = state_of(module, seed=1)
    eager, compiled = fresh(values), fresh(values)
    with unchanged(module):
        expected = _two_calls(module, eager, x)
        result = capture(lambda p, x: _two_calls(module, p, x), compiled, x)
    assert_close(result.out, expected)
    assert_close(compiled, eager)
    assert len(result.graphs) == 1
    assert result.kinds == ["inlined"]


@pytest.mark.compiled
def test_a_buffer_deleted_and_registered_again_in_a_compiled_function() -> None:
    module, x = Rebuilt(), torch.rand(3, 4)
    eager, compiled = state_of(module, seed=1), state_of(module, seed=1)
    with unchanged(module):
        expected = _two_calls(module, eager, x)
        result = capture(lambda p, x: _two_calls(module, p, x), compiled, x)
    assert_close((result.out, compiled), (expected, eager))


@pytest.mark.compiled
def test_an_error_in_a_compiled_function() -> None:
    module, values = Tied(), {"embed.weight": torch.rand(7, 4), "out.weight": torch.rand(7, 4)}
    with unchanged(module), pytest.raises(fcall.errors.TiedValuesError):
        capture(lambda p: _two_calls(module, p, torch.tensor([1])), values)


@pytest.mark.compiled
def test_an_rnn_in_a_compiled_function() -> None:
    module = Recurrent()
    values, x = state_of(module, seed=1), torch.rand(2, 4, 3)
    expected = _two_calls(copy.deepcopy(module), values, x)
    with unchanged(module):
        result = capture(lambda p, x: _two_calls(module, p, x), values, x)
    assert_close(result.out, expected)
