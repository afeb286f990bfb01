"""``fcall.package`` and ``fcall.load``: a file that runs on the weights it is given."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fcall
from compile_tests.support.oracle import assert_close, loaded, state_of
from compile_tests.support.threads import run
from fcall import errors
from fcall.program.archive import record_digest

pytestmark = [pytest.mark.compiled, pytest.mark.inductor]


class Everything(nn.Module):
    """Ties, state changed in both ways, a constant, nested inputs, outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("scale", torch.ones(3))
        self.plain = torch.arange(3.0)

    def forward(self, x: Tensor, more: dict[str, Any], *, power: int = 1) -> dict[str, Any]:
        self.steps = self.steps + 1
        self.total += x.sum(0)
        hidden = self.second(self.first(x).tanh()) * self.scale + self.plain
        return {"y": hidden**power + more["y"], "count": x.shape[0], "name": "all", "none": None}


LEFT_OUT = "scale"


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Everything()


@pytest.fixture(scope="module")
def program(module: nn.Module) -> fcall.Program:
    given = state_of(module)
    del given[LEFT_OUT]
    batch = Dim("batch", min=2, max=100)
    sizes = {"x": {0: batch}, "more": {"y": {0: batch}}, "power": None}
    inputs = (torch.rand(4, 3), {"y": torch.rand(4, 3)})
    return fcall.trace(module, given, inputs, {"power": 2}, dynamic_shapes=sizes)


@pytest.fixture(scope="module")
def path(program: fcall.Program, tmp_path_factory: Any) -> Path:
    written = fcall.package(program, tmp_path_factory.mktemp("package") / "all.pt2")
    assert [file.name for file in written.parent.iterdir()] == ["all.pt2"]
    return written


@pytest.fixture(scope="module")
def runner(path: Path) -> fcall.Runner:
    return fcall.load(path, num_runners=4)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs_of(count: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=generator), {
        "y": torch.rand(count, 3, generator=generator)
    }


def values_of(module: nn.Module, seed: int) -> dict[str, Tensor]:
    values = state_of(module, seed=seed)
    del values[LEFT_OUT]
    return values


def check(runner: Any, module: nn.Module, seed: int, count: int = 5) -> None:
    values = values_of(module, seed)
    inputs = inputs_of(count, seed)
    twin = loaded(module, values)
    twin.plain = twin.plain.double()
    expected = twin(inputs[0].double(), {"y": inputs[1]["y"].double()}, power=2)
    out = runner(values, *inputs, power=2)
    assert (out["count"], out["name"], out["none"]) == (count, "all", None)
    assert_close(out["y"], expected["y"], dtype=torch.float32)
    assert_close(values["steps"], twin.steps, dtype=torch.float32)
    assert_close(values["total"], twin.total, dtype=torch.float32)


def test_what_a_runner_computes(runner: fcall.Runner, module: nn.Module) -> None:
    for seed in range(3):
        for count in (2, 7, 100):
            check(runner, module, seed, count)


def test_order_and_names_are_free(runner: fcall.Runner, module: nn.Module) -> None:
    inputs = inputs_of(5)
    expected = runner(values_of(module, 1), *inputs, power=2)["y"]
    values = values_of(module, 1)
    tied = {**values, "second.weight": values["first.weight"]}
    del tied["first.weight"]
    parts = [{name: nn.Parameter(value, requires_grad=False)} for name, value in values.items()]
    for given in (dict(reversed(values.items())), tied, parts):
        assert_close(runner(given, *inputs, power=2)["y"], expected)


def test_defaults_are_in_the_package(runner: fcall.Runner, module: nn.Module) -> None:
    assert [spec.name for spec in runner.signature.inputs if spec.has_default] == [LEFT_OUT]
    values = {**values_of(module, 1), LEFT_OUT: torch.zeros(3)}
    x, more = inputs_of(5)
    out = runner(values, x, more, power=2)["y"]
    assert_close(out, torch.arange(3.0) ** 2 + more["y"])


def test_it_is_the_same_signature(runner: fcall.Runner, program: fcall.Program) -> None:
    assert runner.signature == program.signature
    assert runner.names == program.names
    assert "x: (s" in repr(runner)
    assert runner.environment["torch"] == torch.__version__


def test_threads(runner: fcall.Runner, module: nn.Module) -> None:
    def call(seed: int) -> Callable[[], None]:
        def calls() -> None:
            with torch.no_grad():
                for _ in range(20):
                    check(runner, module, seed)

        return calls

    run(*[call(seed) for seed in range(8)])


def test_it_needs_neither_the_module_nor_its_code(
    path: Path, module: nn.Module, tmp_path: Path
) -> None:
    values, inputs = values_of(module, 3), inputs_of(4)
    expected = fcall.functional_call(module, dict(values), inputs, {"power": 2})["y"]
    torch.save((values, inputs), tmp_path / "given.pt")
    code = (
        "import sys, torch, fcall\n"
        "values, inputs = torch.load(sys.argv[2])\n"
        "out = fcall.load(sys.argv[1])(values, *inputs, power=2)\n"
        "torch.save(out['y'], sys.argv[3])\n"
    )
    files = [path, tmp_path / "given.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True)
    assert_close(torch.load(files[2]), expected)


# --- what it refuses ----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(runner: fcall.Runner, module: nn.Module) -> None:
    inputs = inputs_of(5)

    def refused(error: Any, *clauses: str, args: Any = inputs, **given: Any) -> None:
        with pytest.raises(error) as info:
            runner({**values_of(module, 1), **given}, *args, power=2)
        for clause in clauses:
            assert clause in str(info.value)

    wrong = errors.ProgramInputsError
    refused(
        wrong,
        "first.bias: expected (3,) float32 on cpu, given (4,)",
        **{"first.bias": torch.rand(4)},
    )
    refused(wrong, "given (3,) float64", **{"first.bias": torch.rand(3).double()})
    refused(
        wrong, "on cpu, given (3,) float32 on meta", **{"first.bias": torch.rand(3, device="meta")}
    )
    transposed = {"first.weight": torch.rand(3, 3).t()}
    refused(
        wrong, "first.weight: expected strides (3, 1), given (1, 3)", "contiguous()", **transposed
    )
    refused(wrong, "2 to 100, and is 1", args=inputs_of(1))
    refused(wrong, "more_y: expected", args=(inputs[0], inputs_of(4)[1]))
    refused(errors.UnexpectedWeightsError, "'first.wieght'", **{"first.wieght": torch.rand(3, 3)})
    with pytest.raises(errors.ProgramInputsError, match="power: expected 2, given 3"):
        runner(values_of(module, 1), *inputs, power=3)
    with pytest.raises(errors.MissingWeightsError, match=r"first\.weight"):
        runner({}, *inputs, power=2)


def test_there_are_no_gradients(runner: fcall.Runner, module: nn.Module) -> None:
    values = values_of(module, 1)
    values["first.bias"].requires_grad_()
    with torch.enable_grad(), pytest.raises(errors.NotPackagedError, match=r"\['first.bias'\]"):
        runner(values, *inputs_of(5), power=2)
    runner(values, *inputs_of(5), power=2)  # under no_grad


def test_there_are_no_transforms(runner: fcall.Runner, module: nn.Module) -> None:
    values = values_of(module, 1)
    x, more = inputs_of(5)
    with pytest.raises(errors.NotPackagedError, match="transforms"):
        torch.func.vmap(lambda x: runner(values, x, more, power=2)["y"])(torch.stack([x, x]))
    with pytest.raises(errors.NotPackagedError, match="Odd"):
        runner(values, x.as_subclass(type("Odd", (Tensor,), {})), more, power=2)


def test_a_file_of_another_name_is_refused(program: fcall.Program, tmp_path: Path) -> None:
    with pytest.raises(errors.PackageNameError, match=r"all\.so"):
        fcall.package(program, tmp_path / "all.so")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off(path: Path, tmp_path: Path, share: float) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((errors.PackageDamagedError, errors.NotAPackageError), match=r"cut\.pt2"):
        fcall.load(cut)


def _rewritten(path: Path, new: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(new, "w") as copy:
        for info in archive.infolist():
            content = change(info.filename, archive.read(info))
            if content is not None:
                copy.writestr(info, content)
    return new


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("part", [".so", "fcall/defaults.pt"])
def test_a_file_that_was_changed(path: Path, tmp_path: Path, part: str) -> None:
    changes = {
        "missing": lambda name, content: None if name.endswith(part) else content,
        "not as it was": lambda name, content: (
            _flipped(content) if name.endswith(part) else content
        ),
    }
    for says, change in changes.items():
        with pytest.raises(errors.PackageDamagedError, match=says):
            fcall.load(_rewritten(path, tmp_path / "new.pt2", change))
    position = path.read_bytes().index(part.encode()) + 4000  # in the file, behind zip's back
    content = path.read_bytes()
    damaged = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    (tmp_path / "bits.pt2").write_bytes(damaged)
    with pytest.raises(errors.PackageDamagedError, match=r"bits\.pt2"):
        fcall.load(tmp_path / "bits.pt2")


def _changed_record(
    path: Path, new: Path, change: Callable[[dict[str, Any]], None], *, with_digest: bool = True
) -> Path:
    def rewrite(name: str, content: bytes) -> bytes:
        if not name.endswith("record.json"):
            return content
        record = json.loads(content)
        change(record)
        if with_digest:
            record["digest"] = record_digest(record)
        return json.dumps(record).encode()

    return _rewritten(path, new, rewrite)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("torch", "2.0.0", "torch: made for 2.0.0, here"),
        ("device", "cuda", "device: made for cuda, here"),
        ("machine", "m68k", "machine: made for m68k, here"),
        ("system", "Plan 9", "system: made for Plan 9, here"),
        ("cpu", ["avx1024"], "cpu: this one has no avx1024"),
    ],
)
def test_a_package_for_another_place(
    path: Path, tmp_path: Path, key: str, value: Any, says: str
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["environment"][key] = value

    new = _changed_record(path, tmp_path / "new.pt2", change)
    without_cuda = mock.patch("torch.cuda.is_available", return_value=False)
    with without_cuda, pytest.raises(errors.PackageMismatchError, match=says):
        fcall.load(new)


def test_what_a_package_says_of_itself(
    path: Path, tmp_path: Path, program: fcall.Program, runner: fcall.Runner
) -> None:
    elsewhere = lambda record: record["environment"].update(machine="m68k")  # noqa: E731
    for file in (path, _changed_record(path, tmp_path / "new.pt2", elsewhere)):
        info = fcall.package_info(file)
        assert info.signature == program.signature
        assert (info.path, info.size) == (file, file.stat().st_size)
        assert info.version == fcall.__version__
    assert fcall.package_info(path).environment == runner.environment
    for broken in ({"title": "Net"}, [], {"inputs": [{}]}):
        new = _changed_record(path, tmp_path / "new.pt2", lambda r, b=broken: r.update(signature=b))
        with pytest.raises(errors.PackageDamagedError, match="record cannot be read"):
            fcall.package_info(new)


@pytest.mark.parametrize("part", ["signature", "out_spec", "environment", "files"])
def test_a_record_that_was_changed(path: Path, tmp_path: Path, part: str) -> None:
    new = _changed_record(
        path, tmp_path / "new.pt2", lambda record: record.pop(part), with_digest=False
    )
    with pytest.raises(errors.PackageDamagedError, match="its record was changed"):
        fcall.load(new)


def test_files_that_are_no_packages(path: Path, tmp_path: Path, module: nn.Module) -> None:
    with pytest.raises(FileNotFoundError):
        fcall.load(tmp_path / "missing.pt2")
    foreign = tmp_path / "foreign.pt2"
    foreign.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(errors.NotAPackageError, match="no zip file"):
        fcall.load(foreign)
    torch.export.save(torch.export.export(nn.Linear(3, 3), (torch.rand(2, 3),)), foreign)
    with pytest.raises(errors.NotAPackageError, match=r"no fcall/record\.json"):
        fcall.load(foreign)
    with pytest.raises(errors.NotAPackageError, match="its format is 1000"):
        fcall.load(_changed_record(path, foreign, lambda record: record.update(format=1000)))
    with pytest.raises(errors.PackageDamagedError, match="record cannot be read"):
        fcall.load(
            _rewritten(path, foreign, lambda name, c: b"{" if name.endswith("record.json") else c)
        )


def test_packaging_that_fails_leaves_what_there_was(
    program: fcall.Program, path: Path, tmp_path: Path
) -> None:
    copy = shutil.copy(path, tmp_path / "all.pt2")
    before = Path(copy).read_bytes()
    with pytest.raises(Exception, match="nonsense"):
        fcall.package(program, copy, options={"nonsense": True})
    assert Path(copy).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["all.pt2"]
