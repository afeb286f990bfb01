"""The benchmarks run, their contenders agree, and what is counted is compared as it should be."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import bench, ceilings, kernels, peers, table, timing
from perf.__main__ import QUESTIONS
from perf.check import differences

# check hides the GPU, for a process of its own.
os.environ.pop("CUDA_VISIBLE_DEVICES", None)

COMMON = {"panel", "n", "contender", "median", "low", "high", "ratio", "off_by"}
BESIDE_CEILINGS = {"tflops", "tbytes", "bound", "gap"}


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")  # by compile_time
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = importlib.import_module(f"perf.{name}")
    record = question.main(quick=True)
    assert record.keys() - {"ceilings"} == {"question", "axis", "unit", "rows"}
    assert record["question"] in question.__doc__
    assert record["question"].endswith("?")
    assert "torch.func / this" in capsys.readouterr().out.replace("\n", "")
    rows = record["rows"]
    places = {(row["panel"], row["n"]) for row in rows}
    for place in places:
        contenders = [row["contender"] for row in rows if (row["panel"], row["n"]) == place]
        assert len(contenders) == len(set(contenders))
        kinds = {contender.partition(",")[0] for contender in contenders}
        assert "torch.func" in kinds
        assert kinds & {"fcall", "fcall.compile"}
    for row in rows:
        assert row.keys() >= COMMON
        assert not row.keys() & {"absent", "failed"}, row
        if "ceilings" in record:
            assert row.keys() >= BESIDE_CEILINGS
            if row["contender"] in bench.TAKEN_APART:
                assert row["host"] > 0 < row["device"]
                assert row["kernels"] or row["gap"] < bench.GAP
        # A time above the plain module's can come out negative, in a run as short as this.
        assert row["low"] <= row["median"] <= row["high"]
        if "without a lock" not in row["contender"]:  # which is there since it is wrong
            assert row["off_by"] < 1e-4, row
            assert not row.get("wrong"), row


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [("", False, "cpu"), ("", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device(name: str, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert timing.device(name).type == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [("cuda", "torch sees no CUDA device"), ("gpu", "the device is cpu or cuda, not 'gpu'")],
)
def test_a_device_that_is_not_there(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=says):
        timing.device(name)


def test_every_file_with_a_question_is_asked() -> None:
    files = Path(bench.__file__).parent.glob("*.py")
    assert sorted(p.stem for p in files if "def main(quick" in p.read_text()) == sorted(QUESTIONS)


def _rows(**times: list[float]) -> dict[str, dict[str, Any]]:
    names = {name.replace("_", "."): taken for name, taken in times.items()}
    rows = bench.rows_of(names, panel="p", n=1, above="module" if "module" in times else None)
    return {row["contender"]: row for row in rows}


def test_ratios_are_to_torch_func() -> None:
    rows = _rows(torch_func=[4.0, 6.0, 8.0], fcall=[1.0, 2.0, 3.0])
    assert rows["fcall"]["ratio"] == 3
    assert (rows["fcall"]["low"], rows["fcall"]["high"]) == (1, 3)


def test_ratios_above_the_module() -> None:
    rows = _rows(module=[1.0, 1.0], torch_func=[5.0, 5.0], fcall=[3.0, 3.0])
    assert rows["module"]["ratio"] is None
    assert (rows["fcall"]["above"], rows["fcall"]["ratio"]) == (2, 2)


def test_wrong_results_are_seen() -> None:
    one, other = torch.tensor([2.0, 4.0]), torch.tensor([2.0, 3.0])
    assert bench.difference([one], [one]) == 0
    assert bench.difference({"a": other}, {"a": one}) == 0.25
    with pytest.raises(ValueError, match="different shapes"):
        bench.difference(one, one[:1])


@pytest.mark.skipif(timing.DEVICE.type == "cuda", reason="the GPU's allocator rounds up")
def test_the_peak_of_memory() -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        second + 1

    assert timing.peak_bytes(call) == pytest.approx(8000, abs=64)  # and the scalars


def _measured(**contenders: Any) -> dict[str, dict[str, Any]]:
    rows = bench.measure(contenders, panel="p", n=1, quick=True)
    return {row["contender"]: row for row in rows}


def _raises(error: Exception) -> Any:
    def call() -> Any:
        raise error

    return call


def test_the_others_are_measured_where_one_cannot_be() -> None:
    one = torch.ones(3)
    rows = _measured(
        first=_raises(RuntimeError("out of memory\nmore")),
        second=lambda: one,
        third=lambda: one + 1,
    )
    assert rows["first"] == {
        "panel": "p",
        "n": 1,
        "contender": "first",
        "failed": "RuntimeError: out of memory",
    }
    assert rows["second"]["median"] > 0
    assert "failed" not in rows["second"]
    assert rows["third"]["failed"] == "its results are off by 1"
    with pytest.raises(KeyError):  # a bug of the benchmark's own
        _measured(first=_raises(KeyError()))


def test_a_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("jax", "tensordict", "perf.with_jax", "perf.with_tensordict"):
        monkeypatch.setitem(sys.modules, module, None)
    for peer, what, name in [
        ("JAX", "maml", "JAX, compiled"),
        ("tensordict", "compiled", "tensordict, compiled"),
        ("tensordict", "eager", "tensordict"),
    ]:
        rows = _measured(**peers.ask(peer, what), other=lambda: torch.ones(1))
        assert peer.lower() in rows[name]["absent"]
        assert rows["other"]["median"] > 0
        record = bench.record("Why?", "n", list(rows.values()))
        assert len(record["rows"]) == 2
        assert f"absent: p, 1: {name}: " in capsys.readouterr().out


def _measure_and_fail() -> None:
    _measured(one=lambda: torch.ones(1))
    raise KeyError


def test_what_is_measured_is_kept_although_the_run_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    kept = tmp_path / "why.so-far.jsonl"
    with pytest.raises(KeyError), bench.kept_so_far("why"):
        _measure_and_fail()
    measured_on, row = map(json.loads, kept.read_text().splitlines())
    assert measured_on["torch"] == torch.__version__
    assert row["contender"] == "one"
    with bench.kept_so_far("why"):
        pass
    assert not kept.exists()


def test_work_beside_the_ceilings() -> None:
    limits = ceilings.Ceilings("float32", flops=1e12, bytes=1e9)
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    work = limits.work(lambda: a @ b, a, {"b": b})
    assert (work.flops, work.bytes) == (2 * 10 * 20 * 30, 4 * (200 + 600))
    rates = work.rates(us=6.4)
    assert rates["tflops"] == pytest.approx(12000 / 6.4e-6 / 1e12)
    assert (rates["bound"], rates["gap"]) == ("byte", pytest.approx(0.5))
    by_products = ceilings.Work(10**7, 1, limits).rates(us=10)
    assert (by_products["bound"], by_products["gap"]) == ("FLOP", pytest.approx(0))


def test_ceilings_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    ceilings.show(quick=True)
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert "TB/s" in out


@pytest.mark.skipif(timing.DEVICE.type == "cuda", reason="kernels have other names there")
def test_kernels_of_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    a = torch.ones(64, 64)
    found = kernels.of(lambda: (a @ a).relu().relu())
    assert {k["name"]: k["count"] for k in found}["aten::relu"] == 2
    assert sum(k["share"] for k in found) == pytest.approx(1)
    assert [k["us"] for k in found] == sorted((k["us"] for k in found), reverse=True)
    kernels.show("Where?", found)
    assert "aten::relu" in capsys.readouterr().out


def test_a_table_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    table.show("Title", ["", "us"], [["long name", "1"], ["a", "1000"]])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "             us",
        "---------  ----",
        "long name     1",
        "a          1000",
    ]


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        ({"a": 110}, {"a": 100}, None),
        ({"a": 90}, {"a": 100}, None),
        ({"a": 111}, {"a": 100}, "a: 111, expected 100 +- 10%"),
        ({"a": 89}, {"a": 100}, "a: 89, expected 100 +- 10%"),
        ({"a": 1}, {"a": 0}, "a: 1, expected 0 +- 10%"),
        ({}, {"a": 0}, "a: not counted"),
        ({"a": 0}, {}, "a: not expected"),
    ],
)
def test_counts_are_compared_with_a_margin(
    found: dict[str, float], expected: dict[str, float], problem: str | None
) -> None:
    assert differences(found, expected, margin=0.1) == ([problem] if problem else [])


def test_each_record_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[perf]'")
    from perf import plots

    row = {"panel": "p; n: depth", "contender": "fcall", "median": 2.0, "low": 1.0, "high": 3.0}
    rows = [row | {"n": n} for n in (1, 10)]
    rows.append({"panel": "p; n: depth", "contender": "JAX", "n": 1, "absent": "no JAX"})
    record = {"question": "Why?", "axis": "parameters", "unit": "us", "rows": rows}
    (tmp_path / "why.json").write_text(json.dumps(record))
    (image,) = plots.main(tmp_path, tmp_path / "images")
    assert image.name == "why.svg"
    for text in ("Why?", "fcall", "depth", "microseconds"):
        assert text in image.read_text()
