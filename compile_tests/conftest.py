"""Fixtures of more than one test file."""

from __future__ import annotations

import pytest
import torch

from compile_tests.support.devices import CUDA
from compile_tests.support.needs import need


@pytest.fixture(params=[CUDA, "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device; with exact float32, since results are compared with float64."""
    if request.param == "cuda":
        need("cuda", "" if torch.cuda.is_available() else "torch sees no CUDA device")
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param
