"""The record that fcall keeps in an AOTInductor package: written, read back, and verified.

A package is a zip file. Beside what torch writes it holds ``fcall/record.json``, with a digest of
each other file and of itself, and ``fcall/defaults.pt``. Reading them runs no code of the package.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcall import errors
from fcall.version import __version__

__all__ = [
    "add_record",
    "environment",
    "read_record",
    "record_digest",
    "refuse_other_environment",
]

FORMAT = 1
RECORD, DEFAULTS = "fcall/record.json", "fcall/defaults.pt"

FEATURES = ("amx", "asimd", "avx", "f16c", "fma", "sve")
"""What the names of those features of a CPU begin with that compiled kernels may use."""


def add_record(path: Path, record: Mapping[str, Any], defaults: Mapping[str, Tensor]) -> None:
    """Add to the package at ``path`` what is to be known to call it."""
    kept = io.BytesIO()
    torch.save(dict(defaults), kept)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = _root(archive)
        archive.writestr(f"{root}/{DEFAULTS}", kept.getvalue())
        digests = {info.filename: _digest(archive, info) for info in archive.infolist()}
        record = {"format": FORMAT, "fcall": __version__, **record, "files": digests}
        text = json.dumps({**record, "digest": record_digest(record)}, indent=1)
        archive.writestr(f"{root}/{RECORD}", text)


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what :func:`add_record` added, after a check of each file against its digest.

    Raises:
        NotAPackageError: it is no package of fcall's.
        PackageDamagedError: a file in it is missing, or not as it was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = _root(archive)
            if f"{root}/{RECORD}" not in names:
                errors.fail(errors.NotAPackageError, str(path), f"it holds no {RECORD}")
            record = json.loads(archive.read(f"{root}/{RECORD}"))
            if record["format"] != FORMAT:
                found = f"its format is {record['format']}, this fcall reads {FORMAT}"
                errors.fail(errors.NotAPackageError, str(path), found)
            if record["digest"] != record_digest(record):
                errors.fail(errors.PackageDamagedError, str(path), "its record was changed")
            _verify(archive, record["files"], path)
            kept = io.BytesIO(archive.read(f"{root}/{DEFAULTS}"))
    except zipfile.BadZipFile as error:
        cut = path.read_bytes()[:2] == b"PK"
        if cut:
            errors.fail(errors.PackageDamagedError, str(path), f"the file is cut off ({error})")
        errors.fail(errors.NotAPackageError, str(path), "it is no zip file")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, errors.FcallError):
            raise
        errors.fail(errors.PackageDamagedError, str(path), f"its record cannot be read ({error})")
    return record, torch.load(kept, weights_only=True)


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the digest of all else in a record."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what compiled code for ``device`` depends on."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": device.type,
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": sorted(_cpu_features()),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"cuda": torch.version.cuda, "compute capability": f"{major}.{minor}"}
    return found


def refuse_other_environment(path: Path, made_in: Mapping[str, Any]) -> None:
    """Refuse to load compiled code that was made for something else.

    Raises:
        PackageMismatchError: saying what differs.
    """
    device = torch.device(made_in["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        here = {**environment(torch.device("cpu")), "device": "cpu alone"}
    else:
        here = environment(device)
    missing = sorted(set(made_in["cpu"]) - set(here["cpu"]))
    differences = [
        f"{key}: made for {value}, here {here.get(key)}"
        for key, value in made_in.items()
        if key != "cpu" and here.get(key) != value
    ]
    if missing and not differences:
        differences.append(f"cpu: this one has no {', '.join(missing)}")
    if differences:
        errors.fail(errors.PackageMismatchError, str(path), differences)


def _cpu_features() -> set[str]:
    """Return the features of this CPU; where the system does not tell, what torch knows."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return {feature for feature in value.split() if feature.startswith(FEATURES)}
    return {torch.backends.cpu.get_cpu_capability().lower()}


def _root(archive: zipfile.ZipFile) -> str:
    """Return the folder that all is in."""
    names = archive.namelist()
    return names[0].partition("/")[0] if names else ""


def _verify(archive: zipfile.ZipFile, digests: Mapping[str, str], path: Path) -> None:
    known = {info.filename: info for info in archive.infolist()}
    for name, digest in digests.items():
        if name not in known:
            errors.fail(errors.PackageDamagedError, str(path), f"{name} is missing")
        try:
            found = _digest(archive, known[name])
        except zipfile.BadZipFile as error:
            errors.fail(errors.PackageDamagedError, str(path), str(error))
        if found != digest:
            errors.fail(errors.PackageDamagedError, str(path), f"{name} is not as it was written")


def _digest(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    return hashlib.sha256(archive.read(info)).hexdigest()
