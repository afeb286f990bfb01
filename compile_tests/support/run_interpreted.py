"""Runs the CUDA code of all cases in Triton's interpreter: ``python -m ...run_interpreted FILE``.

With ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compile_tests.support.compiled import fresh
from compile_tests.support.triton_cases import Case, cases


class Run(NamedTuple):
    """What a case returned."""

    found: Any
    expected: Any
    """In float64."""
    sources: list[str]
    """The modules that were generated and run."""


PLANTED: dict[str, Callable[[str], str]] = {
    "another function": lambda source: source.replace("libdevice.erf(", "libdevice.tanh(", 1),
    "another epsilon": lambda source: source.replace("1, 1], 1e-05,", "1, 1], 1e-04,", 1),
    "a store that is missing": lambda source: source.replace("    tl.store(", "    # tl.store(", 1),
}
"""Mistakes for one kernel of a module, by what they are."""


def main(path: Path) -> None:
    """Write to ``path`` the :class:`Run` of each case, and that of forward for each mistake."""
    made = cases()
    runs = {name: _run(case) for name, case in made.items() if case.run}
    planted = {what: _run(made["forward"], edit) for what, edit in PLANTED.items()}
    path.write_bytes(pickle.dumps((runs, planted)))


def _run(case: Case, edit: Callable[[str], str] = str) -> Run:
    from compile_tests.support.interpreter import interpreting  # for this process alone

    torch.compiler.reset()
    backend, sources = interpreting(edit)
    args = fresh(case.args)
    out = torch.compile(case.ours, backend=backend, fullgraph=True, dynamic=False)(*args)
    return Run(case.result(out, args), case.expected(), sources)


if __name__ == "__main__":
    # By its name: what is pickled here is found there.
    from compile_tests.support import run_interpreted

    run_interpreted.main(Path(sys.argv[1]))
