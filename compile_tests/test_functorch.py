"""functorch's names beside functorch itself: results, ties, transforms, compiled, and warnings."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import functorch
import pytest
import torch
from torch import Tensor, nn

from compile_tests.support.compiled import check_compiled
from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Counter,
    Normed,
    Plain,
    PythonState,
    Recurrent,
    Shared,
    Tied,
)
from compile_tests.support.oracle import assert_close, unchanged
from fcall import errors
from fcall import functorch as ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`functorch\\..*` is deprecated. use `fcall:FutureWarning"),
]
both = pytest.mark.parametrize(
    "library", [pytest.param(functorch, id="torch"), pytest.param(ours, id="fcall")]
)
each_example = pytest.mark.parametrize("name", [*EXAMPLES, "Recurrent"])


def example(name: str) -> tuple[nn.Module, Tensor]:
    return (Recurrent(), torch.rand(2, 4, 3)) if name == "Recurrent" else EXAMPLES[name]()


# --- Modules as functions -----------------------------------------------------------------------


@each_example
def test_make_functional_with_buffers(name: str) -> None:
    module, x = example(name)
    expected_func, *expected = functorch.make_functional_with_buffers(module)
    with unchanged(module):
        func, *state = ours.make_functional_with_buffers(module)
        assert_close(state, expected)
        out = func(*state, x)
    assert_close(out, expected_func(*expected, x))
    assert_close(state, expected)  # what was written into buffers
    assert (func.param_names, func.buffer_names) == (
        expected_func.param_names,
        expected_func.buffer_names,
    )
    for a, e in zip(state[0], expected[0]):
        assert (type(a), a.requires_grad) == (type(e), e.requires_grad)


@both
def test_make_functional(library: ModuleType) -> None:
    module, x = MLP(), torch.rand(5, 3)
    func, params = library.make_functional(module)
    assert isinstance(params, tuple)
    assert_close(func(params, x), module(x))
    assert_close(func(iter(params), x, scale=2.0), module(x, scale=2.0))
    zeros = [torch.zeros_like(p) for p in params]
    assert not func(zeros, x).any()
    func(params, x).sum().backward()
    assert all(p.grad is not None for p in params)
    assert all(p.grad is None for p in module.parameters())


@both
def test_the_function_owns_nothing(library: ModuleType) -> None:
    func, _, _ = library.make_functional_with_buffers(Normed())
    assert isinstance(func, nn.Module)
    tensors = [*func.parameters(), *func.buffers()]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in tensors)


@both
@pytest.mark.parametrize("make", [Tied, Shared])
def test_ties(library: ModuleType, make: Callable[[], nn.Module]) -> None:
    module = make()
    func, params = library.make_functional(module)
    assert len(params) == len(list(module.parameters()))
    x = torch.arange(5) if make is Tied else torch.rand(2, 3)
    assert_close(func(params, x), module(x))


@both
def test_frozen_parameters(library: ModuleType) -> None:
    module = MLP()
    module.l1.weight.requires_grad_(False)
    assert [p.requires_grad for p in library.make_functional(module)[1]] == [False, *[True] * 3]
    _, params = library.make_functional(module, disable_autograd_tracking=True)
    assert not any(p.requires_grad for p in params)
    assert module.l2.weight.requires_grad


@both
def test_buffers_are_refused_by_make_functional(library: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="make_functional_with_buffers") as caught:
        library.make_functional(Normed())
    if library is ours:
        assert "Normed has ['norm.running_mean'" in str(caught.value)


@both
def test_a_reassigned_buffer_is_lost(library: ModuleType) -> None:
    func, params, buffers = library.make_functional_with_buffers(Counter())
    assert func(params, buffers, torch.zeros(())) == 1
    assert func(params, buffers, torch.zeros(())) == 1
    assert buffers[0] == 0


@both
def test_tensors_that_are_not_registered_stay(library: ModuleType) -> None:
    module = Plain()
    func, params = library.make_functional(module)
    assert func(params) == module()


@both
def test_training_mode(library: ModuleType) -> None:
    func, params = library.make_functional(nn.Dropout(1.0))
    x = torch.ones(3)
    assert not func(params, x).any()
    assert func.eval()(params, x).all()


def test_the_number_of_tensors() -> None:
    """torch ignores what is too much, and leaves what is missing on meta."""
    func, params, buffers = ours.make_functional_with_buffers(Normed())
    x = torch.rand(4, 2, 6, 6)
    with pytest.raises(errors.ValuesCountError, match="takes 4 params, but got 3"):
        func(params[:3], buffers, x)
    with pytest.raises(errors.ValuesCountError, match="takes 3 buffers, but got 4"):
        func(params, (*buffers, x), x)


@both
def test_ensemble(library: ModuleType) -> None:
    models, x = [Normed().eval() for _ in range(3)], torch.rand(4, 2, 6, 6)
    expected = torch.stack([model(x) for model in models])
    func, params, buffers = library.combine_state_for_ensemble(models)
    assert not any(tensor.requires_grad for tensor in (*params, *buffers))
    assert_close(torch.vmap(func, (0, 0, None))(params, buffers, x), expected)


@both
@pytest.mark.parametrize(
    "models",
    [
        pytest.param(list, id="none"),
        pytest.param(lambda: [MLP(), Tied()], id="classes"),
        pytest.param(lambda: [MLP(), MLP().eval()], id="modes"),
    ],
)
def test_no_ensemble(library: ModuleType, models: Callable[[], list[nn.Module]]) -> None:
    with pytest.raises(RuntimeError):
        library.combine_state_for_ensemble(models())


@both
def test_the_function_in_transforms(library: ModuleType) -> None:
    module, x = MLP(), torch.rand(5, 3)
    func, params = library.make_functional(module, disable_autograd_tracking=True)

    def loss(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return func(params, x).square().sum()

    module(x).square().sum().backward()
    per_sample = library.vmap(library.grad(loss), in_dims=(None, 0))(params, x)
    for mine, parameter in zip(per_sample, module.parameters()):
        assert_close(mine.sum(0), parameter.grad)


# --- Compiled -----------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["Normed", "Tied", "Shared", "parametrized"])
def test_the_function_compiled(name: str) -> None:
    module, x = example(name)
    func, params, buffers = ours.make_functional_with_buffers(module)
    check_compiled(lambda p, b, x: func(p, b, x), params, buffers, x, module=func)


@pytest.mark.compiled
def test_the_function_compiled_itself() -> None:
    """With keyword arguments, and as the module that it is."""
    module, x = MLP(), torch.rand(5, 3)
    func, params = ours.make_functional(module)
    torch.compiler.reset()
    compiled = torch.compile(func, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, x, scale=2.0), module(x, scale=2.0))
    with pytest.raises(errors.ValuesCountError, match="takes 4 params, but got 3"):
        compiled(params[:3], x)


@pytest.mark.compiled
def test_python_state_is_inlined() -> None:
    func, params = ours.make_functional(PythonState())
    torch.compiler.reset()
    compiled = torch.compile(func, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3)
    first, second = compiled(params, x), compiled(params, x)
    assert_close(second, 2 * first)


@pytest.mark.compiled
def test_transforms_of_the_function_compiled() -> None:
    func, params = ours.make_functional(MLP(), disable_autograd_tracking=True)

    def step(params: tuple[Tensor, ...], x: Tensor) -> Any:
        def loss(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return func(params, x).square().sum()

        return ours.vmap(ours.grad(loss), in_dims=(None, 0))(params, x)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.rand(5, 3)
    with pytest.warns(FutureWarning, match="functorch.vmap"):
        out = compiled(params, x)
    assert_close(out, step(params, x))


@pytest.mark.compiled
def test_ensemble_compiled() -> None:
    func, params, buffers = ours.combine_state_for_ensemble([MLP() for _ in range(3)])
    torch.compiler.reset()
    ensemble = torch.vmap(func, (0, 0, None))
    compiled = torch.compile(
        lambda p, b, x: torch.vmap(func, (0, 0, None))(p, b, x), fullgraph=True, backend="aot_eager"
    )
    x = torch.rand(5, 3)
    assert_close(compiled(params, buffers, x), ensemble(params, buffers, x))


# --- Transforms ---------------------------------------------------------------------------------


def _pull(vjp: Callable[..., Any], x: Tensor) -> Any:
    out, pull = vjp(torch.sin, x)
    return out, pull(x)


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda vmap, x: vmap(torch.sum, in_dims=1)(x),
    "grad": lambda grad, x: grad(lambda x: x.sin().sum())(x),
    "grad_and_value": lambda grad, x: grad(lambda x: x.sin().sum())(x),
    "vjp": _pull,
    "jvp": lambda jvp, x: jvp(torch.sin, (x,), (x,)),
    "jacrev": lambda jacrev, x: jacrev(torch.sin)(x),
    "jacfwd": lambda jacfwd, x: jacfwd(torch.sin)(x),
    "hessian": lambda hessian, x: hessian(lambda x: x.sin().sum())(x),
    "functionalize": lambda functionalize, x: functionalize(lambda x: x.clone().add_(1))(x),
}


@pytest.mark.parametrize("name", USES)
def test_a_transform(name: str) -> None:
    x = torch.rand(2, 3)
    assert_close(USES[name](getattr(ours, name), x), USES[name](getattr(functorch, name), x))


@pytest.mark.compiled
@pytest.mark.parametrize("name", USES)
def test_a_transform_compiled(name: str) -> None:
    transform = getattr(ours, name)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: USES[name](transform, x), fullgraph=True, backend="aot_eager"
    )
    x = torch.rand(2, 3)
    with pytest.warns(FutureWarning, match=f"use `fcall.func.{name}`"):
        out = compiled(x)
    assert_close(out, USES[name](transform, x))


@pytest.mark.parametrize("name", USES)
def test_a_transform_takes_functorchs_arguments(name: str) -> None:
    """But for what is private."""
    expected = inspect.signature(getattr(functorch, name)).parameters
    assert {n for n in expected if n[0] != "_"} <= set(
        inspect.signature(getattr(ours, name)).parameters
    )


# --- Warnings, and the rest of the package ------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "old", "new"),
    [
        (lambda: ours.make_functional(MLP()), "make_functional", "functional_call"),
        (
            lambda: ours.make_functional_with_buffers(MLP()),
            "make_functional_with_buffers",
            "functional_call",
        ),
        (
            lambda: ours.combine_state_for_ensemble([MLP()]),
            "combine_state_for_ensemble",
            "func.stack_module_state",
        ),
        *[
            (
                lambda name=name: USES[name](getattr(ours, name), torch.rand(2, 3)),
                name,
                f"func.{name}",
            )
            for name in USES
        ],
    ],
)
def test_each_name_warns_once(use: Callable[[], Any], old: str, new: str) -> None:
    with pytest.warns(FutureWarning) as warned:
        use()
    (warning,) = warned
    assert str(warning.message) == f"`functorch.{old}` is deprecated: use `fcall.{new}`."
    assert warning.filename == __file__


@both
def test_the_function_does_not_warn(library: ModuleType) -> None:
    func, params = library.make_functional(nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        func(params, torch.ones(1, 3))


def test_all_of_functorch_is_there() -> None:
    public = [n for n in vars(functorch) if n[0] != "_" and n not in ("torch", "dim", "einops")]
    for name in (*public, "compile", "experimental"):
        assert getattr(ours, name) is not None
    assert ours.make_fx is functorch.make_fx
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ours.nothing


@pytest.mark.compiled
def test_compile_is_functorchs() -> None:
    import functorch.compile

    assert ours.compile is functorch.compile
    graph = ours.compile.aot_function(torch.sin, fw_compiler=ours.compile.nop)
    x = torch.rand(3)
    assert_close(graph(x), x.sin())


def test_functorch_is_imported_when_asked_for() -> None:
    code = "import sys, fcall.functorch; print('functorch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
