"""A torch that lacks a private name: compiled calls are inlined, right, and one warning says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.compiled

RUN = """
import importlib, json, sys, warnings
import torch, torch._dynamo

deleted = []
for name in sys.argv[1:]:
    owner, _, name = name.rpartition(".")
    owner = importlib.import_module(owner)
    deleted.append((owner, name, getattr(owner, name)))
    delattr(owner, name)

import fcall

for owner, name, thing in deleted:
    if not owner.__name__.startswith("torch._dynamo"):
        setattr(owner, name, thing)  # torch needs it; fcall looks for it when it is imported


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps = self.steps + 1
        return x * self.steps


model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
counter = Counter()


def call(p, steps, x):
    return fcall.functional_call(counter, steps, fcall.functional_call(model, p, x))


def gradient(p, steps, x):
    return torch.func.grad(lambda p: fcall.functional_call(model, p, x).square().sum())(p)


x, p = torch.rand(5, 3), {n: torch.rand_like(v) for n, v in model.state_dict().items()}
error = ""
with warnings.catch_warnings(record=True) as caught, fcall.record_routes() as routes:
    warnings.simplefilter("always")
    for fn in (call, gradient):
        results = []
        for run in (fn, torch.compile(fn, fullgraph=True, backend="eager")):
            steps = {"steps": torch.ones(())}
            results.append((run(p, steps, x), steps))
        torch.testing.assert_close(results[1], results[0])
    try:
        torch.compile(call, fullgraph=True, backend="eager")({"nothing.weight": x}, {}, x)
    except fcall.errors.UnknownPathError as caught_error:
        error = str(caught_error)
print(json.dumps({
    "warnings": [str(w.message) for w in caught if w.category is fcall.errors.FcallWarning],
    "routes": [[route.kind, route.reason] for route in routes if route.kind != "eager"],
    "error": error,
}))
"""


def run_without(*names: str) -> dict[str, Any]:
    """Run the script above where ``names`` were deleted before fcall was imported."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *names],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert "'nothing.weight'" in report["error"]
    return report  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name",
    [
        "torch._dynamo.variables.higher_order_ops.speculate_subgraph_with_auto_output_flattening",
        "torch._dynamo.variables.higher_order_ops._hop_name_to_variable_class",
        "torch._higher_order_ops.utils.reenter_make_fx",
    ],
)
def test_without_a_name_that_the_operator_needs(name: str) -> None:
    report = run_without(name)
    (message,) = report["warnings"]
    missing = name.rpartition(".")[2]
    for clause in (torch.__version__, missing, "inlined", "results are the same", "2.11 to 2.15"):
        assert clause in message
    assert [kind for kind, _ in report["routes"]] == ["inlined"] * 3
    for _, reason in report["routes"]:
        assert torch.__version__ in reason
        assert missing in reason


def test_without_names_that_can_be_done_without() -> None:
    report = run_without(
        "torch._C._dynamo.eval_frame.set_code_exec_strategy", "torch._dynamo.config.allow_rnn"
    )
    assert report["warnings"] == []
    assert report["routes"] == [["operator", ""]] * 3
