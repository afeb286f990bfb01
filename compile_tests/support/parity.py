"""Both implementations of ``functional_call``, for the tests that run over each of them."""

from __future__ import annotations

import pytest
import torch

import fcall

TORCH = torch.func.functional_call

both = pytest.mark.parametrize(
    "call",
    [pytest.param(TORCH, id="torch"), pytest.param(fcall.functional_call, id="fcall")],
)
