"""What fcall.kernels generates for a GPU: fused as the plain module is, built by ptxas, and right.

No GPU is needed. One process generates the code and compiles it, another runs it in Triton's
interpreter; the tests look at what they found (support/triton_cases.py has the functions).
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from compile_tests.support.needs import need_triton
from compile_tests.support.run_generated import Records
from compile_tests.support.run_interpreted import PLANTED, Run
from fcall.kernels import Generated, parse

pytestmark = [pytest.mark.compiled, pytest.mark.inductor]

ROOT = Path(__file__).resolve().parent.parent

MATMULS = {
    "forward": 2,  # one for each linear layer
    "traced forward": 2,
    "training": 6,  # and two for each in backward: with respect to its input, and its weight
    "step": 6,
    "per-sample gradients": 4,  # those of a weight are products of two vectors: pointwise
    "two calls": 12,
    "buffers": 5,  # two layers; what comes before the first needs no gradient
    "ensemble of 2": 2,
    "ensemble of 5": 2,
    "step of an ensemble of 2": 6,
    "step of an ensemble of 5": 6,
}
"""The calls of matmuls in each case: the only thing that is left to a library."""

FUSED = {
    "forward": ["add native_layer_norm", "addmm gelu"],  # the bias of addmm; mm is the library's
    "training": [
        "add native_layer_norm",
        "add mse_loss mse_loss_backward",
        "gelu gelu_backward sum",
        "native_layer_norm native_layer_norm_backward add",
    ],
    "step": [  # SGD in the kernels that compute the gradients
        "add native_layer_norm native_layer_norm_backward mse_loss_backward",
        "gelu_backward sum mul sub",
        "native_layer_norm native_layer_norm_backward mul sub",
    ],
    "per-sample gradients": [
        "add gelu",
        "add native_layer_norm native_layer_norm_backward",
    ],
    "two calls": [
        "add native_layer_norm native_layer_norm_backward",
        "native_layer_norm mse_loss mse_loss_backward",
    ],
    "buffers": ["_native_batch_norm_legit_functional relu copy_"],  # buffers are written in it, too
    "ensemble of 2": ["add gelu", "add native_layer_norm"],
    "step of an ensemble of 2": [
        "gelu_backward sum mul sub",
        "native_layer_norm sum mul sub",
    ],
}
"""Operators, pointwise ones and reductions, that have to be in one kernel."""

IN_THE_DOCS = {
    "forward": "forward",
    "forward and backward": "training",
    "`grad_and_value` and SGD in one graph": "step",
    "gradients of each sample, `vmap(grad(...))`": "per-sample gradients",
    "forward of an ensemble, of any size": "ensemble of 2",
    "`grad_and_value` and SGD of an ensemble": "step of an ensemble of 2",
    "two calls, with other weights each, and their backward": "two calls",
}
"""The rows of the table in docs/operator.md."""

EACH = list(MATMULS)
RUN = [name for name in EACH if name != "traced forward" and "of 5" not in name]
WITH_PLAIN = [name for name in EACH if "of 5" not in name]
WITH_FUSION_OFF = [name for name in RUN if name != "buffers"]


def _in_a_process(module: str, path: Path, **environment: str) -> Any:
    """Return what a module of compile_tests.support, run as a program, wrote to ``path``."""
    need_triton()
    cache = str(path.parent / "cache")  # its own: what is found in a cache was not built here
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"compile_tests.support.{module}", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What was generated."""
    return _in_a_process("run_generated", tmp_path_factory.mktemp("generated") / "records")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], dict[str, Run]]:
    """What it gave: of each case, and for each planted mistake."""
    path = tmp_path_factory.mktemp("interpreted") / "runs"
    return _in_a_process("run_interpreted", path, TRITON_INTERPRET="1")


# --- Which kernels ------------------------------------------------------------------------------


def _without_order(generated: Generated) -> list[tuple[Any, ...]]:
    """Of each graph its kernels, launches and calls of libraries, whatever their order.

    The number in the name of a kernel depends on it.
    """
    contents = []
    for graph in generated.graphs:
        names = {kernel.name: kernel.name.rpartition("_")[0] for kernel in graph.kernels}
        kernels = sorted((names[k.name], k.kind, *sorted(k.operators)) for k in graph.kernels)
        launches = Counter(names[name] for name in graph.launches)
        contents.append((kernels, launches, Counter(graph.externs)))
    return contents


def _code(generated: Generated) -> list[str]:
    kernels = generated.kernels
    return sorted(k.source.replace(k.name, k.name.rpartition("_")[0]) for k in kernels)


@pytest.mark.parametrize("name", WITH_PLAIN)
def test_the_same_kernels_as_without_fcall(records: Records, name: str) -> None:
    record = records.of[name]
    assert record.plain is not None
    assert _without_order(record.ours) == _without_order(record.plain)
    assert len(record.ours.launches) >= len(record.ours.kernels) > 0
    if name != "two calls":  # where one kernel writes to a buffer that it read, and one does not
        assert _code(record.ours) == _code(record.plain)


@pytest.mark.parametrize("name", EACH)
def test_each_call_is_the_operator(records: Records, name: str) -> None:
    calls = {"traced forward": 0, "two calls": 2}.get(name, 1)
    assert records.of[name].routes == ["operator"] * calls


@pytest.mark.parametrize("name", EACH)
def test_a_backward_graph_where_there_is_a_backward(records: Records, name: str) -> None:
    has_backward = name in ("training", "two calls", "buffers")
    assert len(records.of[name].ours.graphs) == 1 + has_backward


@pytest.mark.parametrize("name", WITH_FUSION_OFF)
def test_clearly_fewer_launches_than_with_fusion_off(records: Records, name: str) -> None:
    record = records.of[name]
    assert record.unfused is not None
    assert len(record.ours.launches) <= 0.7 * len(record.unfused.launches)
    assert record.ours.externs == record.unfused.externs


@pytest.mark.parametrize("name", ["ensemble of {}", "step of an ensemble of {}"])
def test_launches_do_not_grow_with_an_ensemble(records: Records, name: str) -> None:
    small, large = (records.of[name.format(size)].ours for size in (2, 5))
    assert small.launches == large.launches
    assert small.externs == large.externs


def test_as_many_launches_as_for_one_model(records: Records) -> None:
    """One more where vmap adds a bias that addmm, of which there is no batched one, had added."""
    for name in ("forward", "step"):
        of_many = "ensemble of 2" if name == "forward" else "step of an ensemble of 2"
        one, many = (len(records.of[case].ours.launches) for case in (name, of_many))
        assert many <= one + 1


@pytest.mark.parametrize("name", EACH)
def test_only_matmuls_are_left_to_a_library(records: Records, name: str) -> None:
    externs = records.of[name].ours.externs
    assert set(externs) <= {"mm", "addmm", "bmm"}
    assert len(externs) == MATMULS[name]


@pytest.mark.parametrize("name", FUSED)
def test_pointwise_operators_and_reductions_are_fused(records: Records, name: str) -> None:
    kernels = records.of[name].ours.kernels
    for wanted in FUSED[name]:
        operators = {f"aten.{operator}" for operator in wanted.split()}
        homes = [kernel for kernel in kernels if operators <= set(kernel.operators)]
        assert homes, f"no kernel has all of {sorted(operators)}"
        if operators & {"aten.sum", "aten.native_layer_norm", "aten.mse_loss"}:
            assert any("reduction" in kernel.kind for kernel in homes)


def test_no_memory_is_needed(records: Records) -> None:
    """A weight of 4 TiB."""
    (graph,) = records.huge.graphs
    assert graph.externs == ("mm",)
    assert [kernel.operators for kernel in graph.kernels] == [("aten.addmm", "aten.relu")]


def test_the_figures_in_the_docs(records: Records) -> None:
    page = (ROOT / "docs" / "operator.md").read_text()
    table = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    found = {}
    for row, name in IN_THE_DOCS.items():
        ours, unfused = records.of[name].ours, records.of[name].unfused
        assert unfused is not None
        counted = (ours.kernels, ours.launches, unfused.launches, ours.externs)
        found[row] = [str(len(things)) for things in counted]
    assert {row: figures for row, *figures in table} == found


def test_random_numbers(records: Records) -> None:
    """They are drawn in the kernel that uses them; a library makes the seed."""
    forward, backward = records.random.graphs
    assert forward.externs == ("mm", "randint")
    (kernel,) = forward.kernels
    assert kernel.operators == ("aten.addmm", "aten.native_dropout", "aten.sum")
    assert "tl.rand(" in kernel.source
    assert [kernel.operators[1] for kernel in backward.kernels] == ["aten.native_dropout_backward"]


# --- What they are compiled to ------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_each_kernel_is_built_in_each_configuration(records: Records, name: str) -> None:
    for kernel in records.of[name].ours.kernels:
        built = records.cubins[kernel]
        assert built, kernel.name
        for one in built:
            assert one.cubin.startswith(b"\x7fELF")
            assert one.target == "sm_90a"
            assert (one.stack, one.local) == (0, 0), f"{kernel.name} spills, or uses local memory"
            assert 0 < one.registers < 255
            assert one.warps in (1, 2, 4, 8, 16, 32)


def test_a_kernel_that_spills_is_noticed(records: Records) -> None:
    assert any(built.stack > 1000 for built in records.spilling)


# --- What they compute --------------------------------------------------------------------------


def _assert_right(run: Run) -> None:
    """Compare with the oracle, which is in float64."""
    found, spec = pytree.tree_flatten(run.found)
    expected, expected_spec = pytree.tree_flatten(run.expected)
    assert spec == expected_spec
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("name", RUN)
def test_results_are_right(runs: tuple[dict[str, Run], Any], name: str) -> None:
    _assert_right(runs[0][name])


@pytest.mark.parametrize("name", RUN)
def test_what_was_run_is_what_was_built(
    records: Records, runs: tuple[dict[str, Run], Any], name: str
) -> None:
    assert runs[0][name].sources == [graph.source for graph in records.of[name].ours.graphs]


@pytest.mark.parametrize("what", PLANTED)
def test_a_mistake_in_one_kernel_is_noticed(
    runs: tuple[dict[str, Run], dict[str, Run]], what: str
) -> None:
    right, planted = runs[0]["forward"], runs[1][what]
    assert planted.sources == right.sources
    assert planted.expected.equal(right.expected)
    before = parse(right.sources[0]).kernels
    after = parse(PLANTED[what](right.sources[0])).kernels
    assert sum(one.source != other.source for one, other in zip(before, after)) == 1
    with pytest.raises(AssertionError, match="not close"):
        _assert_right(planted)
