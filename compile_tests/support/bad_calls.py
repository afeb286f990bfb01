"""Calls that are wrong, for tables of them: what is given, what is raised, what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fcall
from compile_tests.support.models import MLP
from compile_tests.support.oracle import unchanged

X = torch.rand(2, 3)
BIAS = torch.rand(4)
ALL = {name: tensor.detach() for name, tensor in MLP().named_parameters()}
"""An input, a value and all values for an MLP."""


class Bad(NamedTuple):
    """A call of ``module`` with ``dicts``, ``args`` and ``options``."""

    dicts: Any
    error: type[Exception]
    clauses: list[str]
    module: Callable[[], Any] = MLP
    args: tuple[Any, ...] = (X,)
    options: dict[str, Any] = {}  # noqa: RUF012, never mutated


def check(case: Bad) -> None:
    """Check that the call raises, twice alike, and changes neither the module nor the dict."""
    module = case.module()

    def call() -> Any:
        return fcall.functional_call(module, case.dicts, *case.args, **case.options)

    before = dict(case.dicts) if isinstance(case.dicts, dict) else None
    if _has_a_fingerprint(module):
        with unchanged(module):
            _raises(case, call)
            _raises(case, call)  # with what is kept of the first
    else:
        _raises(case, call)
    if before is not None:
        assert list(case.dicts) == list(before)
        assert all(case.dicts[name] is value for name, value in before.items())


def _has_a_fingerprint(module: Any) -> bool:
    lazy = (nn.LazyLinear, nn.LazyBatchNorm1d)
    return isinstance(module, nn.Module) and not isinstance(module, (torch.jit.ScriptModule, *lazy))


def _raises(case: Bad, call: Callable[[], Any]) -> None:
    with pytest.raises(case.error) as raised:
        call()
    assert type(raised.value) is case.error
    for clause in case.clauses:
        assert clause in str(raised.value)
