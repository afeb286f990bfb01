"""``package_info``: what a package is, without running any of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcall import errors
from fcall.program.archive import read_record
from fcall.program.signature import Signature

__all__ = ["PackageInfo", "package_info"]


@dataclasses.dataclass(frozen=True)
class PackageInfo:
    """What a package says of itself; made by :func:`package_info`."""

    path: Path
    size: int
    """In bytes."""
    version: str
    """That of the fcall that made it."""
    environment: Mapping[str, Any]
    """What it was made with, and for: torch, device, system, machine, features of the CPU."""
    signature: Signature
    """What it takes."""


def package_info(path: str | os.PathLike[str]) -> PackageInfo:
    """Read what :func:`fcall.package` wrote, and verify its digests, but run none of its code.

    Unlike :func:`fcall.load` it reads packages for other machines, too.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: there is no such file.
        NotAPackageError: it is none of fcall's (a ``ValueError``).
        PackageDamagedError: it was cut off or changed (a ``ValueError``).
    """
    path = Path(path)
    record, _ = read_record(path)
    try:
        signature = Signature.from_json(record["signature"])
        return PackageInfo(
            path, path.stat().st_size, record["fcall"], record["environment"], signature
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        errors.fail(errors.PackageDamagedError, str(path), f"its record cannot be read ({error})")
