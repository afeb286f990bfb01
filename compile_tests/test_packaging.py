"""What stands around the code: pyproject.toml, constraints.txt and the Makefile agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def _pinned() -> set[str]:
    """The names that constraints.txt pins for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name) for pin in pins if not pin.marker or pin.marker.evaluate()}


def _needed_by(name: str, extras: set[str], found: dict[str, set[str]]) -> None:
    """Add to ``found`` what ``name[extras]`` needs, directly or not: a name and its extras each."""
    if extras <= found.get(name, set()) and name in found:
        return
    found.setdefault(name, set()).update(extras)
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # an extra that is not installed here
    for line in requirements:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            _needed_by(canonicalize_name(requirement.name), set(requirement.extras), found)


def test_all_that_the_makefile_installs_is_pinned() -> None:
    found: dict[str, set[str]] = {}
    _needed_by("fcall", set(metadata.metadata("fcall").get_all("Provides-Extra")), found)
    assert sorted(found.keys() - {"fcall"} - _pinned()) == []


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("fcall").joinpath("py.typed").is_file()


def _make(target: str, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``make target`` where there is no .venv yet."""
    make = shutil.which("make")
    assert make, "make is not on the PATH"
    shutil.copy(ROOT / "Makefile", folder)
    # Without what a surrounding make hands down.
    env = {k: v for k, v in os.environ.items() if not re.match(r"MAKE|MFLAGS|PYTHON|VENV", k)}
    return subprocess.run(
        [make, target, *settings], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "test-cuda"])
@pytest.mark.parametrize(
    ("settings", "clauses"),
    [
        (["CXX=no-such-compiler"], ["C++ compiler", '"no-such-compiler"', "install", "CXX"]),
        (["PYTHON=no-such-python"], ["Python 3.10 or newer", '"no-such-python"', "install"]),
        (["PYTHON=false"], ["Python 3.10 or newer", '"false"', "install"]),
    ],
)
def test_what_a_machine_lacks_is_said_in_one_line(
    tmp_path: Path, target: str, settings: list[str], clauses: list[str]
) -> None:
    result = _make(target, tmp_path, f"PYTHON={sys.executable}", *settings)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    for clause in clauses:
        assert clause in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_make_alone_lists_the_targets(tmp_path: Path) -> None:
    listed = _make("help", tmp_path).stdout
    for target in (
        "demo",
        "test",
        "test-fast",
        "test-all",
        "test-cuda",
        "check",
        "format",
        "expect",
    ):
        assert re.search(rf"^make {target} +\w", listed, re.MULTILINE)
