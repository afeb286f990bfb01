"""``record_routes``: which way each call took."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import nn

from compile_tests.support.models import MLP
from fcall import Route, functional_call, record_routes, routes

X = torch.rand(2, 3)
EAGER_MLP = Route(module="MLP", kind="eager", reason="")


def test_eager_calls_are_recorded_in_order() -> None:
    with record_routes() as recorded:
        assert recorded == []
        functional_call(MLP(), {}, X)
        functional_call(nn.Linear(3, 2), {}, X)
        functional_call(MLP(), {}, X, method="encode")
    assert recorded == [EAGER_MLP, Route("Linear", "eager", ""), EAGER_MLP]


def test_nothing_is_recorded_outside() -> None:
    functional_call(MLP(), {}, X)
    with record_routes() as recorded:
        pass
    functional_call(MLP(), {}, X)
    assert recorded == []


def test_calls_inside_of_calls_are_recorded() -> None:
    class Outer(nn.Module):
        def forward(self, x: Any) -> Any:
            return functional_call(MLP(), {}, x)

    with record_routes() as recorded:
        functional_call(Outer(), {}, X)
    assert [route.module for route in recorded] == ["Outer", "MLP"]


def test_calls_in_transforms_are_recorded() -> None:
    with record_routes() as recorded:
        torch.func.grad(lambda x: functional_call(MLP(), {}, x).sum())(X)
    assert recorded == [EAGER_MLP]


def test_nested_recordings() -> None:
    module = MLP()
    with record_routes() as outer:
        functional_call(module, {}, X)
        with record_routes() as inner, record_routes() as same:
            functional_call(module, {}, X)
            functional_call(module, {}, X)
        functional_call(module, {}, X)
    assert len(outer) == 4
    assert inner == same == [EAGER_MLP] * 2


def test_the_end_of_a_recording_leaves_an_equal_one_alone() -> None:
    with record_routes() as outer:
        with record_routes() as inner:
            pass
        assert outer == inner == []
        functional_call(MLP(), {}, X)
    assert (outer, inner) == ([EAGER_MLP], [])


def test_a_recording_ends_when_an_exception_leaves_it() -> None:
    module = MLP()
    module.encode = lambda x: [][0]
    with pytest.raises(IndexError), record_routes() as recorded:
        functional_call(module, {}, X)
    functional_call(MLP(), {}, X)
    assert recorded == [EAGER_MLP]


def test_a_call_that_raises_took_its_route() -> None:
    with record_routes() as recorded:
        with pytest.raises(RuntimeError):
            functional_call(MLP(), {}, torch.rand(2, 5))
        with pytest.raises(AttributeError):  # this one never got on its way
            functional_call(MLP(), {"zz.weight": X}, X)
    assert recorded == [EAGER_MLP]


def test_calls_of_other_threads_are_recorded() -> None:
    with record_routes() as recorded:
        thread = threading.Thread(target=functional_call, args=(MLP(), {}, X))
        thread.start()
        thread.join()
    assert recorded == [EAGER_MLP]


def test_inlined_calls_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fcall"), record_routes() as recorded:
        routes.record("Net", routes.INLINED, "it counts its calls")
    assert recorded == [Route("Net", "inlined", "it counts its calls")]
    assert caplog.record_tuples == [
        ("fcall", logging.INFO, "the call of Net is inlined: it counts its calls")
    ]


@pytest.mark.parametrize("kind", [routes.EAGER, routes.OPERATOR])
def test_other_routes_are_not_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fcall"), record_routes() as recorded:
        routes.record("Net", kind)
    assert recorded == [Route("Net", kind, "")]
    assert caplog.records == []
