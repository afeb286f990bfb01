"""What a machine may lack: a test that needs it is skipped, and says why.

But where ``FCALL_MUST_RUN`` names it, as in ``FCALL_MUST_RUN=triton,cuda``, the test fails.
"""

from __future__ import annotations

import os

import pytest

from fcall import passes
from fcall._torch import triton


def need(what: str, problem: str) -> None:
    """Skip the test if there is a problem with ``what``, or fail it where it must run."""
    if not problem:
        return
    if what in os.environ.get("FCALL_MUST_RUN", "").split(","):
        pytest.fail(f"{what} must run here (FCALL_MUST_RUN), but: {problem}", pytrace=False)
    pytest.skip(problem)


def need_c() -> None:
    """For tests of what is in C."""
    need("c", "" if passes.IN_C else "fcall's C was not built: it needs a C compiler")


def need_triton() -> None:
    """For tests that generate CUDA code."""
    need("triton", triton.problem())
