"""The benchmarks run, their contenders agree, and what is counted is compared as it should be."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import bench
from perf.__main__ import QUESTIONS
from perf.check import differences

# check hides the GPU, for a process of its own.
os.environ.pop("CUDA_VISIBLE_DEVICES", None)

COMMON = {"panel", "n", "contender", "median", "low", "high", "ratio", "off_by"}


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")  # by compile_time
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = importlib.import_module(f"perf.{name}")
    record = question.main(quick=True)
    assert record.keys() == {"question", "axis", "unit", "rows"}
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
    assert bench.device(name).type == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [("cuda", "torch sees no CUDA device"), ("gpu", "the device is cpu or cuda, not 'gpu'")],
)
def test_a_device_that_is_not_there(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=says):
        bench.device(name)


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


@pytest.mark.skipif(bench.DEVICE.type == "cuda", reason="the GPU's allocator rounds up")
def test_the_peak_of_memory() -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        second + 1

    assert bench.peak_bytes(call) == pytest.approx(8000, abs=64)  # and the scalars


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
    record = {"question": "Why?", "axis": "parameters", "unit": "us", "rows": rows}
    (tmp_path / "why.json").write_text(json.dumps(record))
    (image,) = plots.main(tmp_path, tmp_path / "images")
    assert image.name == "why.svg"
    for text in ("Why?", "fcall", "depth", "microseconds"):
        assert text in image.read_text()
