"""Transforms of torch.func over eager calls, compared with the same over torch.func's own call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from compile_tests.support.models import (
    EXAMPLES,
    MLP,
    Counter,
    Normed,
    PythonState,
    Tied,
    parametrized,
)
from compile_tests.support.oracle import assert_close, loaded, state_of, unchanged
from compile_tests.support.parity import TORCH, both
from fcall import errors, functional_call

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]
Transform = Callable[[Forward, Params, Tensor], Any]


def _scalar(f: Forward) -> Forward:
    return lambda p, x: f(p, x).square().mean()


def _two(p: Params) -> Params:
    return {name: torch.stack([value, value * 0.5]) for name, value in p.items()}


def _last(f: Forward, transform: Any, p: Params, x: Tensor) -> Any:
    """Transform ``f`` in the last of its parameters only, which has few numbers."""
    name, value = list(p.items())[-1]
    return transform(lambda last: f({**p, name: last}, x))(value)


def _step(f: Forward, p: Params, x: Tensor) -> Params:
    return {name: p[name] - 0.1 * g for name, g in grad(_scalar(f))(p, x).items()}


def _through_a_step(f: Forward, p: Params, x: Tensor) -> Any:
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    loss = _scalar(f)(_step(f, leaves, x), x)
    return loss, torch.autograd.grad(loss, list(leaves.values()))


def _linearized(f: Forward, p: Params, x: Tensor) -> Any:
    out, push = linearize(lambda p: f(p, x), p)
    return out, push(p)


def _pulled_back(f: Forward, p: Params, x: Tensor) -> Any:
    out, pull = vjp(lambda p: f(p, x), p)
    return out, pull(torch.ones_like(out))


def _with_aux(f: Forward, p: Params, x: Tensor) -> Any:
    return grad(lambda p, x: ((out := f(p, x)).mean(), out), has_aux=True)(p, x)


TRANSFORMS: dict[str, Transform] = {
    "grad": lambda f, p, x: grad(_scalar(f))(p, x),
    "grad with aux": _with_aux,
    "grad_and_value": lambda f, p, x: grad_and_value(_scalar(f))(p, x),
    "vmap over weights": lambda f, p, x: vmap(f, (0, None))(_two(p), x),
    "vmap over inputs": lambda f, p, x: vmap(lambda x: f(p, x[None]))(x),
    "vmap over both": lambda f, p, x: vmap(f)(_two(p), torch.stack([x, x])),
    "vmap in chunks": lambda f, p, x: vmap(lambda x: f(p, x[None]), chunk_size=1)(x),
    "vjp": _pulled_back,
    "jvp": lambda f, p, x: jvp(lambda p: f(p, x), (p,), (p,)),
    "jacrev": lambda f, p, x: _last(f, jacrev, p, x),
    "jacfwd": lambda f, p, x: _last(f, jacfwd, p, x),
    "hessian": lambda f, p, x: _last(_scalar(f), hessian, p, x),
    "linearize": _linearized,
    "functionalize": lambda f, p, x: functionalize(f)(p, x),
    "gradient of each example": lambda f, p, x: vmap(
        grad(lambda p, x: _scalar(f)(p, x[None])), (None, 0)
    )(p, x),
    "gradient of each model": lambda f, p, x: vmap(grad(_scalar(f)), (0, None))(_two(p), x),
    "vmap of vmap": lambda f, p, x: vmap(
        lambda p: vmap(lambda x: f(p, x[None]))(x), randomness="error"
    )(_two(p)),
    "grad of grad": lambda f, p, x: grad(
        lambda p: sum(g.square().sum() for g in grad(_scalar(f))(p, x).values())
    )(p),
    "jacrev of jacfwd": lambda f, p, x: _last(_scalar(f), lambda g: jacrev(jacfwd(g)), p, x),
    "jvp of grad": lambda f, p, x: jvp(lambda p: grad(_scalar(f))(p, x), (p,), (p,)),
    "two steps": lambda f, p, x: _scalar(f)(_step(f, _step(f, p, x), x), x),
    "autograd through a step": _through_a_step,
}

NAMES = ["MLP", "Attention", "Tied", "parametrized", "Shared", "Normed in eval"]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("model", NAMES)
def test_transforms(model: str, transform: Transform) -> None:
    torch.manual_seed(0)
    module, x = EXAMPLES[model]()
    module = module.double()
    x = x.double() if x.is_floating_point() else x
    values = state_of(module, seed=1)
    params = {name: values[name] for name, _ in module.named_parameters()}

    def over(call: Any) -> Any:
        twin = copy.deepcopy(module)  # torch leaves shared submodules changed
        with unchanged(twin) if call is not TORCH else torch.enable_grad():
            return transform(lambda p, x: call(twin, p, x), dict(params), x)

    assert_close(over(functional_call), over(TORCH))


def test_the_call_itself_is_transformed() -> None:
    module, x = MLP().double(), torch.rand(2, 3, dtype=torch.float64)
    params = state_of(module, seed=1)
    with unchanged(module):
        ours = jacrev(functional_call, argnums=1)(module, params, (x,))
    assert_close(ours, jacrev(TORCH, argnums=1)(module, params, (x,)))
    assert ours["l1.weight"].shape == (2, 2, 4, 3)


def test_a_keyword_argument_is_transformed() -> None:
    module, x = MLP().double(), torch.rand(2, 3, dtype=torch.float64)
    params, scale = state_of(module, seed=1), torch.tensor(2.0, dtype=torch.float64)

    def loss(call: Any) -> Any:
        return grad(lambda s: call(module, params, x, {"scale": s}).sum())(scale)

    assert_close(loss(functional_call), loss(TORCH))


def test_another_method_is_transformed() -> None:
    module, x = MLP().double(), torch.rand(2, 3, dtype=torch.float64)
    params = state_of(module, seed=1)
    ours = grad(lambda p: functional_call(module, p, x, method="encode").sum())(params)
    twin = loaded(module, params)
    twin.encode(x).sum().backward()
    assert_close(ours["l1.weight"], twin.l1.weight.grad)
    assert ours["l2.weight"].eq(0).all()


def test_forward_mode_without_a_transform() -> None:
    from torch.autograd import forward_ad

    module, x = MLP().double(), torch.rand(2, 3, dtype=torch.float64)
    params = state_of(module, seed=1)
    with forward_ad.dual_level(), unchanged(module):
        duals = {name: forward_ad.make_dual(p, p) for name, p in params.items()}
        tangent = forward_ad.unpack_dual(functional_call(module, duals, x)).tangent
    _, expected = jvp(lambda p: TORCH(module, p, x), (params,), (params,))
    assert_close(tangent, expected)


# --- Ensembles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["MLP", "Attention", "parametrized", "Normed in eval"])
def test_an_ensemble_on_a_base_without_memory(model: str) -> None:
    torch.manual_seed(0)
    models, inputs = zip(*[EXAMPLES[model]() for _ in range(3)])
    params, buffers = stack_module_state(list(models))
    base = copy.deepcopy(models[0]).to("meta")
    with unchanged(base):
        out = vmap(lambda p, b, x: functional_call(base, (p, b), x), (0, 0, None))(
            params, buffers, inputs[0]
        )
    assert_close(out, torch.stack([m(inputs[0]) for m in models]))


def test_an_ensemble_whose_base_lost_its_ties() -> None:
    models = [Tied() for _ in range(2)]
    params, _ = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    tokens = torch.tensor([1, 2])
    with unchanged(base), pytest.raises(errors.MetaTensorError, match=r"'out\.weight'"):
        vmap(lambda p: functional_call(base, p, tokens))(params)
    out = vmap(lambda p: functional_call(models[0], p, tokens))(params)
    assert_close(out, torch.stack([m(tokens) for m in models]))


# --- State under transforms ---------------------------------------------------------------------


def _outcome(fn: Callable[[], Any]) -> Any:
    """Return what ``fn`` returns, or torch's words for why it does not."""
    try:
        return fn()
    except errors.InPlaceUnderTransformError as error:
        return str(error.__cause__).splitlines()[0]
    except RuntimeError as error:
        return str(error).splitlines()[0]


@pytest.mark.parametrize("where", ["captured", "as an argument", "the module's own"])
def test_buffers_written_in_place_under_grad(where: str) -> None:
    """torch refuses to write into what a transform did not make, and so does fcall's call."""

    def over(call: Any) -> Any:
        torch.manual_seed(0)
        module, x = Normed(), torch.rand(4, 2, 6, 6)
        params = state_of(module, seed=1)
        buffers = {name: params.pop(name) for name in list(params) if "running" in name}
        tracked = {"norm.num_batches_tracked": params.pop("norm.num_batches_tracked")}

        def loss(p: Params, b: Params) -> Tensor:
            given = (p,) if where == "the module's own" else (p, b, tracked)
            return call(module, given, x).square().mean()

        def run() -> Any:
            if where == "as an argument":
                return grad(loss)(params, buffers)
            return grad(lambda p: loss(p, buffers))(params)

        out = _outcome(run)
        return out, buffers, tracked, state_of(module)

    assert_close(over(functional_call), over(TORCH))


@both
def test_a_reassigned_buffer_leaves_a_transform(call: Any) -> None:
    module = Counter()

    def loss(x: Tensor, state: Params) -> tuple[Tensor, Params]:
        state = dict(state)
        return call(module, state, x), state

    with unchanged(module):
        gradient, state = grad(loss, has_aux=True)(torch.tensor(2.0), {"foo": torch.tensor(5.0)})
        out = vmap(lambda s: loss(torch.zeros(()), s))({"foo": torch.tensor([1.0, 2.0])})
    assert gradient == 1
    assert state["foo"] == 6
    assert out[0].tolist() == out[1]["foo"].tolist() == [2, 3]


def test_the_module_runs_once_for_each_transform() -> None:
    module, x = PythonState(), torch.rand(2, 3)
    params = state_of(module, seed=1)
    vmap(grad(lambda p, x: functional_call(module, p, x).sum()), (None, 0))(params, x)
    assert module.calls == 1


def test_an_exception_under_transforms() -> None:
    module = parametrized()
    params = state_of(module, seed=1)
    with unchanged(module), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        vmap(grad(lambda p, x: functional_call(module, p, x).sum()), (None, 0))(
            params, torch.rand(2, 1, 7)
        )


def test_modules_made_of_functions_of_their_weights() -> None:
    """A module whose own forward takes a gradient with respect to its child's weights."""

    class InnerStep(nn.Module):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3).double()
            self.call = call

        def forward(self, x: Tensor) -> Tensor:
            step = _step(
                lambda p, x: self.call(self.child, p, x), dict(self.child.named_parameters()), x
            )
            return self.call(self.child, step, x)

    x = torch.rand(2, 3, dtype=torch.float64)
    values = state_of(InnerStep(TORCH), seed=1)

    def over(call: Any) -> Any:
        module = InnerStep(call)
        with unchanged(module):
            return grad(lambda p: call(module, p, x).square().mean())(values)

    assert_close(over(functional_call), over(TORCH))
