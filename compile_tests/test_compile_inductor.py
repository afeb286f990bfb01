"""``fcall.compile`` with Inductor: its settings, and the assertions that are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fcall
from compile_tests.support.compiled import backward, fresh, gradients
from compile_tests.support.models import EXAMPLES, MLP
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that each compilation by Inductor gets; the graph is then run as it is."""
    seen: list[dict[str, Any]] = []

    def compile_fx(graph: GraphModule, inputs: Any, *, config_patches: Any, **_: Any) -> Any:
        seen.append(config_patches)
        return graph

    import torch._inductor.compile_fx as home

    monkeypatch.setattr(home, "compile_fx", compile_fx)
    return seen


@torch.library.custom_op("fcall_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(MLP):
    """Uses an operator that is not torch's."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return doubled(super().forward(x, scale=scale))


LEAN = {"size_asserts": False}


@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (MLP, {}, LEAN),
        (MLP, {"mode": "default"}, LEAN),
        (MLP, {"mode": "reduce-overhead"}, {"triton.cudagraphs": True, **LEAN}),
        (MLP, {"options": {"max_fusion_size": 3}}, {"max_fusion_size": 3, **LEAN}),
        (MLP, {"options": {"size_asserts": True}}, {"size_asserts": True}),
        (Custom, {}, {}),
        (Custom, {"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
    ],
)
def test_settings(
    make: Callable[[], nn.Module],
    settings: dict[str, Any],
    expected: dict[str, Any],
    patches: list[dict[str, Any]],
) -> None:
    module, x = make(), torch.rand(5, 3)
    p = state_of(module, seed=1)
    before = {key: dict(value) for key, value in settings.items() if key == "options"}
    fn = fcall.compile(module, **settings)
    for _ in range(2):
        assert_close(fn(p, x), fcall.functional_call(module, p, x))
    assert patches == [expected]
    assert {key: settings[key] for key in before} == before  # torch.compile takes some out


def test_options_are_checked_at_once() -> None:
    with pytest.raises(RuntimeError, match="Unexpected optimization option nothing"):
        fcall.compile(MLP(), options={"nothing": 1})


@pytest.mark.inductor
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_results_and_gradients(mode: str | None) -> None:
    module, x = EXAMPLES["Normed"]()
    fn = fcall.compile(module, mode=mode)
    for seed in range(3):
        p = state_of(module, seed=seed)
        for name, _ in module.named_parameters():
            p[name].requires_grad_()
        same = fresh(p)
        with fcall.record_routes() as routes:
            out = fn(p, x)
        expected = fcall.functional_call(module, same, x)
        backward(out)
        backward(expected)
        assert_close(out, expected)
        assert_close(p, same)
        assert_close(gradients(p), gradients(same))
    assert [route.kind for route in routes] == ["fast"]


@pytest.mark.inductor
def test_a_custom_operator_that_lies_is_found_out() -> None:
    class Lies(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fcall_tests.lies(super().forward(x)) + 1

    fn = fcall.compile(Lies(3, 3))
    p = state_of(Lies(3, 3), seed=1)
    with pytest.raises(AssertionError, match="stride"):
        fn(p, torch.rand(3, 3))


@torch.library.custom_op("fcall_tests::lies", mutates_args=())
def lies(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@lies.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.inductor
def test_any_number_of_rows() -> None:
    module, _ = EXAMPLES["MLP"]()
    p = state_of(module, seed=1)
    fn = fcall.compile(module, dynamic=True)
    for rows in (5, 7, 11):
        x = torch.rand(rows, 3)
        assert_close(fn(p, x), loaded(module, p)(in_float64(x)))
