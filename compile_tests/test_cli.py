"""``python -m fcall``: export, inspect and run, as a user calls them."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fcall
import fcall.cli
from compile_tests.support.oracle import assert_close, loaded, state_of

ROOT = Path(fcall.__file__).resolve().parent.parent

MODULE = """
import torch
import fcall
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x, more, *, power=1):
        self.steps += 1
        y = self.second(self.first(x).tanh()) ** power + more["y"]
        return {"y": y, "parts": (y.sum(0), {"mean": y.mean()}), "count": x.shape[0], "name": "net"}

    def encode(self, x):
        return self.first(x).tanh()


def net():
    torch.manual_seed(0)
    return Net(), (torch.rand(4, 3), {"y": torch.rand(4, 3)}), {"power": 2}


def encoder():
    return Net(), torch.rand(4, 3)


def program():
    return fcall.trace(nn.Linear(3, 2), {}, torch.rand(4, 3))


def raises():
    raise KeyError("no such data")


def fails():
    return nn.Linear(3, 2), (torch.rand(4, 5),)


def number():
    return 5


value = 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Where the user's files lie."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "nets.py").write_text(MODULE)
    (folder / "broken.py").write_text("import no_such_library\n")
    return folder


@pytest.fixture(scope="module")
def net(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("nets_here", folder / "nets.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.net()[0]
    return made


def command(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fcall", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def exported(folder: Path) -> subprocess.CompletedProcess[str]:
    return command(
        *(folder, "export", "nets:net", "net.pt2"),
        *("--dynamic", "x:0=batch:2:64", "more.y:0=batch"),
        *("--options", "max_autotune=False"),
    )


@pytest.fixture(scope="module")
def path(exported: subprocess.CompletedProcess[str], folder: Path) -> Path:
    assert exported.returncode == 0, exported.stderr
    return folder / "net.pt2"


def here(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command in this process, where it goes wrong, and return what it says."""
    assert fcall.cli.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    *steps, line = captured.err.splitlines()
    assert all(step.endswith(" ...") for step in steps)
    assert line.startswith("python -m fcall: ")
    return line


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the lines after one of dashes."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("--"))
    return [line.split() for line in lines[start + 1 :]]


# --- a journey ----------------------------------------------------------------------------------


@pytest.mark.inductor
def test_export(exported: subprocess.CompletedProcess[str], path: Path, folder: Path) -> None:
    first, head, _, *rows = exported.stdout.splitlines()
    assert first.startswith("net.pt2: Net, ")
    assert " compiled in " in first
    assert head.split() == ["name", "kind", "shape", "dtype", "device", "tied", "to", "changed"]
    weight = ["first.weight", "parameter", "[3,", "3]", "float32", "cpu", "second.weight"]
    assert rows[0].split() == weight
    assert rows[2].split() == ["steps", "buffer", "[]", "float32", "cpu", "in", "place"]
    assert [row.split()[0] for row in rows[3:6]] == ["x", "more_y", "power"]
    assert rows[5].split() == ["power", "constant", "=", "2"]
    assert rows[6].endswith(": 2 to 64")
    assert exported.stderr.splitlines() == ["tracing Net ...", "compiling Net ..."]
    assert not list(folder.glob(".*"))


@pytest.mark.inductor
def test_inspect(path: Path, folder: Path) -> None:
    told = command(folder, "inspect", "net.pt2")
    assert (told.returncode, told.stderr) == (0, "")
    first, version, *_ = told.stdout.splitlines()
    assert first.startswith("net.pt2: Net, ")
    assert first.endswith("digests verified")
    assert version == f"made by fcall {fcall.__version__}"
    assert f"torch: {torch.__version__}" in told.stdout
    assert table_of(told.stdout)[0][:2] == ["first.weight", "parameter"]
    assert "2 to 64" in told.stdout


@pytest.mark.inductor
def test_inspect_json(path: Path, folder: Path) -> None:
    told = command(folder, "inspect", "net.pt2", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    record = json.loads(told.stdout)
    info = fcall.package_info(path)
    assert record["environment"]["torch"] == torch.__version__
    assert record["size"] == path.stat().st_size == info.size
    assert [one["name"] for one in record["inputs"]] == [s.name for s in info.signature.inputs]
    assert record["inputs"][0]["tied"] == ["second.weight"]
    assert list(record["ranges"].values()) == [[2, 64]]


@pytest.mark.inductor
def test_inspect_runs_nothing_of_the_package(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("fcall._torch.ahead.load_aoti", side_effect=AssertionError):
        assert fcall.cli.main(["inspect", str(path)]) == 0
        elsewhere = mock.patch("fcall.program.archive.environment", side_effect=AssertionError)
        with elsewhere:
            assert fcall.cli.main(["inspect", str(path)]) == 0
    assert "digests verified" in capsys.readouterr().out


@pytest.fixture
def given(net: nn.Module, folder: Path) -> dict[str, Any]:
    """Files for the package, and the oracle of what it computes."""
    values = state_of(net, seed=1)
    inputs = {"x": torch.rand(5, 3), "more_y": torch.rand(5, 3)}
    save_file(values, folder / "w.safetensors")
    save_file({"module." + k: v for k, v in values.items()}, folder / "prefixed.safetensors")
    save_file(inputs, folder / "x.safetensors")
    twin = loaded(net, values)
    expected = twin(inputs["x"].double(), {"y": inputs["more_y"].double()}, power=2)
    return {"values": values, "inputs": inputs, "expected": expected}


@pytest.mark.inductor
def test_run(path: Path, folder: Path, given: dict[str, Any]) -> None:
    told = command(
        *(folder, "run", "net.pt2", "--weights", "prefixed.safetensors", "--prefix", "module."),
        *("--input", "x.safetensors", "--output", "y.safetensors"),
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [
        "y.safetensors: y, parts_0, parts_1.mean",
        "count = 5",
        "name = 'net'",
        "changed in memory alone: steps",
    ]
    expected = given["expected"]
    total, rest = expected["parts"]
    named = {"y": expected["y"], "parts_0": total, "parts_1.mean": rest["mean"]}
    written, weights = load_file(folder / "y.safetensors"), load_file(folder / "w.safetensors")
    assert written.keys() == named.keys()
    assert_close({name: written[name] for name in named}, named, dtype=torch.float32)
    assert_close({name: weights[name] for name in given["values"]}, given["values"])


@pytest.mark.inductor
@pytest.mark.usefixtures("in_folder", "given")
def test_run_without_output_summarises(
    path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(path), "--weights", "w.safetensors", "--input", "x.safetensors"]
    assert fcall.cli.main(arguments) == 0
    row = table_of(capsys.readouterr().out)[0]
    y = given["expected"]["y"]
    assert row[:4] == ["y", "[5,", "3]", "float32"]
    assert_close(
        torch.tensor([float(cell) for cell in row[4:]]),
        torch.stack([y.min(), y.mean(), y.max()]),
    )


@pytest.mark.inductor
@pytest.mark.usefixtures("in_folder", "given")
def test_run_with_what_does_not_fit(
    path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", path, "--weights", "w.safetensors", "--input", "x.safetensors"]
    wrong = {**given["values"], "first.wieght": torch.rand(3, 3)}
    save_file(wrong, "wrong.safetensors")
    save_file({"x": torch.rand(5, 3), "more": torch.rand(5, 3)}, "other.safetensors")
    save_file({"x": torch.rand(5, 4), "more_y": torch.rand(5, 3)}, "shape.safetensors")
    Path("cut.safetensors").write_bytes(Path("w.safetensors").read_bytes()[:-4])
    for position, file, *clauses in [
        (3, "none.safetensors", "none.safetensors: No such file or directory"),
        (3, "wrong.safetensors", "'first.wieght' (did you mean 'first.weight'?)"),
        (3, "prefixed.safetensors", "prefix 'module.' removed"),
        (3, "x.safetensors", "no inputs named 'more_y', 'x'"),
        (3, "cut.safetensors", "cut.safetensors cannot be read as weights", "not fully covered"),
        (5, "none.safetensors", "none.safetensors: No such file or directory"),
        (
            5,
            "other.safetensors",
            "given: more_y: not given; more: not known (did you mean 'more_y'?)",
        ),
        (5, "shape.safetensors", "x: expected (", "given (5, 4) float32 on cpu"),
    ]:
        line = here(capsys, *run[:position], file, *run[position + 1 :])
        for clause in clauses:
            assert clause in line
    assert "takes values for ['first.weight', 'first.bias', 'steps']" in here(
        capsys, "run", path, "--input", "x.safetensors"
    )
    assert "x: not given" in here(capsys, *run[:4])
    assert "there is no folder" in here(capsys, *run, "--output", "none/y.safetensors")
    assert "--prefix says" in here(capsys, "run", path, "--prefix", "module.")


@pytest.mark.inductor
def test_packages_that_are_none(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.pt2").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "text.pt2").write_text("a text")
    for subcommand in ("inspect", "run"):
        for name, clause in [
            ("none.pt2", "none.pt2: No such file or directory"),
            ("cut.pt2", "cut.pt2 is damaged: the file is cut off"),
            ("text.pt2", "text.pt2 is not a package that fcall.package wrote"),
        ]:
            assert clause in here(capsys, subcommand, tmp_path / name)


# --- what export traces, without a compiler -----------------------------------------------------


def traced(*arguments: str) -> fcall.Program:
    """Return the program that ``export`` would compile."""

    class ToHere(Exception):
        pass

    with mock.patch("fcall.cli.export.package", side_effect=ToHere) as package:
        with pytest.raises(ToHere):
            fcall.cli.main(["export", arguments[0], "out.pt2", *arguments[1:]])
        program: fcall.Program = package.call_args.args[0]
    return program


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder")
def test_export_takes_the_modules_own_values() -> None:
    program = traced("nets:net")
    assert program.names == ("first.weight", "first.bias", "steps")
    assert not program.defaults
    assert [spec.shape for spec in program.signature.inputs if spec.name == "x"] == [(4, 3)]


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder")
def test_export_of_a_method() -> None:
    program = traced("nets:encoder", "--method", "encode", "--dynamic", "x:0=batch")
    x = torch.rand(7, 3)
    values = {"first.weight": torch.eye(3), "first.bias": torch.zeros(3), "steps": torch.zeros(())}
    assert_close(program(values, x), x.tanh())


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder")
def test_export_with_weights(net: nn.Module, folder: Path) -> None:
    values = {f"m.{name}": value for name, value in state_of(net, seed=1).items()}
    bias = values.pop("m.first.bias")
    save_file(values, "part.safetensors")
    weights = ("--weights", "part.safetensors", "--prefix", "m.")
    assert set(traced("nets:net", *weights).defaults) == {"first.bias"}
    baked = traced("nets:net", *weights, "--bake-rest")
    assert set(baked.names) == {"first.weight", "steps"}
    save_file({**values, "m.first.bias": bias.double()}, "double.safetensors")
    assert traced("nets:encoder", "--method", "encode", "--bake-rest").names == ()


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder")
def test_export_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(traced("nets:program").defaults) == {"weight", "bias"}
    line = here(capsys, "export", "nets:program", "out.pt2", "--method", "f", "--bake-rest")
    assert "['--method', '--bake-rest'] say nothing" in line


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder", "given")
@pytest.mark.parametrize(
    ("arguments", "clauses"),
    [
        (("nets",), ["'nets' names no factory: expected package.module:function"]),
        (("nets:nett",), ["nets has no 'nett' (did you mean 'net'?)"]),
        (("nets:value",), ["nets:value is a int, and no function to call"]),
        (("no_such_module:f",), ["cannot import no_such_module: ModuleNotFoundError"]),
        (("broken:f",), ["cannot import broken: ", "no_such_library"]),
        (("nets:raises",), ["nets:raises() raised KeyError: 'no such data'", "nets.py, line "]),
        (("nets:number",), ["has to return (module, args)", "but returned int"]),
        (("nets:fails",), ["tracing failed: ", "[4, 5]"]),
        (("nets:net", "--method", "forwards"), ["no method 'forwards'", "'forward'?"]),
        (("nets:net", "--dynamic", "x=2"), ["--dynamic x=2: expected INPUT:DIMENSION=NAME"]),
        (("nets:net", "--dynamic", "z:0=b"), ["z: no such tensor", "['x', 'more.y']"]),
        (("nets:net", "--dynamic", "x:2=b"), ["x:2: it has 2 dimensions"]),
        (("nets:net", "--dynamic", "x:0=b:2", "x:1=b:3"), ["b has other limits before: 2:"]),
        (("nets:net", "--dynamic", "x:0=batch"), ["tracing failed: ", "batch"]),
        (("nets:net", "--options", "x"), ["--options x: expected KEY=VALUE"]),
        (("nets:net", "--prefix", "m."), ["--prefix says"]),
        (("nets:net", "--weights", "none.safetensors"), ["none.safetensors: No such file"]),
        (("nets:net", "--weights", "x.safetensors"), ["no inputs named 'more_y', 'x'"]),
        (("nets:net", "--weights", "prefixed.safetensors"), ["prefix 'module.' removed"]),
    ],
)
def test_export_of_what_cannot_be(
    arguments: tuple[str, ...], clauses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = here(capsys, "export", arguments[0], "out.pt2", *arguments[1:])
    for clause in clauses:
        assert clause in line
    assert not Path("out.pt2").exists()


@pytest.mark.usefixtures("in_folder")
def test_names_of_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ends in .pt2, but got 'out.so'" in here(capsys, "export", "nets:net", "out.so")


@pytest.mark.compiled
@pytest.mark.usefixtures("in_folder")
def test_options_are_parsed() -> None:
    from fcall.cli.factory import options_of

    given = ["a=1", "b=True", "c=false", "d=text", "e=x=y", "f='q'", "g="]
    expected = {"a": 1, "b": True, "c": False, "d": "text", "e": "x=y", "f": "q", "g": ""}
    assert options_of(given) == expected


# --- the command itself -------------------------------------------------------------------------


def test_exit_codes(folder: Path) -> None:
    for arguments, status in [
        (["--help"], 0),
        (["export", "--help"], 0),
        ([], 2),
        (["imspect"], 2),
        (["inspect"], 2),
        (["inspect", "none.pt2"], 1),
    ]:
        told = command(folder, *arguments)
        assert told.returncode == status, told.stderr
        assert "Traceback" not in told.stderr
        if status == 1:
            assert told.stderr == "python -m fcall: none.pt2: No such file or directory\n"


@pytest.mark.parametrize("name", ["export", "inspect", "run"])
def test_each_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        fcall.cli.main([name, "--help"])
    assert status.value.code == 0
    assert f"example:\n  python -m fcall {name} " in capsys.readouterr().out


def test_commands_in_the_docs() -> None:
    text = (ROOT / "docs" / "package.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("python -m fcall ")]
    assert len(lines) >= 3
    for line in lines:
        options = fcall.cli.parser().parse_args(shlex.split(line)[3:])
        assert options.command.__name__ == line.split()[3]


def test_tables_and_steps_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from fcall.cli import show

    rows = [["[b]", "1", ""], ["long name", "", ""]]
    show.print_table(["name", "size", "empty"], rows)
    plain = capsys.readouterr().out
    assert plain == "name       size\n---------  ----\n[b]        1\nlong name\n"
    with mock.patch("sys.stdout.isatty", return_value=True):
        show.print_table(["name", "size", "empty"], rows)
        told = capsys.readouterr().out
        assert told != plain
        assert "[b]" in told  # no markup
        with mock.patch.dict(sys.modules, {"rich": None, "rich.box": None}):
            show.print_table(["name", "size", "empty"], rows)
    assert capsys.readouterr().out == plain
    for is_terminal in (False, True):
        with mock.patch("sys.stderr.isatty", return_value=is_terminal), show.step("at [work]"):
            pass
        shown = capsys.readouterr().err
        assert (shown == "at [work] ...\n") != is_terminal


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1536_000, "1.54 MB"), (10**13, "1e+04 GB")],
)
def test_sizes(count: int, expected: str) -> None:
    from fcall.cli.show import human_size

    assert human_size(count) == expected
