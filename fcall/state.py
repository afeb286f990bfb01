"""``open_state``: the tensors of a safetensors file as a mapping that reads what is asked for."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcall import _torch, errors
from fcall.prefixes import prefixes_of

__all__ = ["State", "open_state"]

ENDING, INDEX = ".safetensors", ".safetensors.index.json"


def open_state(
    path: str | os.PathLike[str], *, prefix: str = "", dtype: torch.dtype | None = None
) -> State:
    """Open weights on disk as a mapping, for all that takes parameters and buffers by name.

    The file is mapped into memory, where tensors take their place as their numbers are needed. It
    has to stay as it is for as long as its tensors are used.

    Args:
        path: A ``.safetensors`` file; the ``.safetensors.index.json`` of a sharded one; or a folder
            that holds ``model.safetensors.index.json`` or one ``.safetensors`` file.
        prefix: What to remove from the names, with its dot, as ``"module."``. Names without it are
            left out.
        dtype: What to convert floating tensors to when they are read. ``None`` leaves all as they
            are.

    Returns:
        A mapping that reads a tensor when it is first asked for, and then keeps it.

    Raises:
        FileNotFoundError: there is no such file.
        MissingExtraError: the package safetensors is not installed (an ``ImportError``).
        StateDtypeError: ``dtype`` is not floating (a ``TypeError``).
        StateFileError: the file is damaged, cut off, or something else; a shard is missing (a
            ``ValueError``).
        UnknownPrefixError: no name has the prefix (a ``ValueError``).

    Example::

        >>> import fcall, safetensors.torch, torch
        >>> weights = {"module.weight": torch.ones(2, 3), "module.bias": torch.zeros(2)}
        >>> safetensors.torch.save_file(weights, "weights.safetensors")
        >>> state = fcall.open_state("weights.safetensors", prefix="module.")
        >>> list(state)
        ['bias', 'weight']
        >>> fcall.functional_call(torch.nn.Linear(3, 2), state, torch.ones(1, 3))
        tensor([[3., 3.]])
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        errors.fail(errors.StateDtypeError, str(dtype))
    path = Path(path)
    homes = _homes(path)
    if prefix:
        known = prefixes_of(homes)
        if prefix not in known:
            errors.fail(errors.UnknownPrefixError, str(path), prefix, known)
    return State(path, homes, prefix, dtype)


class State(Mapping[str, Tensor]):
    """Tensors on disk by name; made by :func:`open_state`.

    It cannot be written to. Its tensors can, as those of any mapping: what a module changes in
    place stays in memory, for as long as the State does, and never gets to the file.
    """

    def __init__(
        self, path: Path, homes: Mapping[str, _File], prefix: str, dtype: torch.dtype | None
    ) -> None:
        self.path = path
        """What was opened."""
        self.prefix = prefix
        """What was removed from the names."""
        self.dtype = dtype
        """What floating tensors are converted to; None if they are not."""
        start = len(prefix)
        self._homes = {
            name[start:]: file for name, file in homes.items() if name.startswith(prefix)
        }
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        file = self._homes[name]
        with torch.inference_mode(False):  # it may be used outside, too
            tensor = file.read(self.prefix + name)
            if self.dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
        if _torch.in_functorch_transform() or _torch.in_proxy_mode():
            return tensor  # which may belong to the transform
        return self._kept.setdefault(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __repr__(self) -> str:
        return f"State({str(self.path)!r}: {len(self)} tensors)"


class _File:
    """A safetensors file, opened when it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._open().keys())

    def read(self, name: str) -> Tensor:
        """Return a tensor, whose memory is that of the mapped file."""
        opened = self._open()
        try:
            tensor: Tensor = opened.get_tensor(name)
        except _library_errors() as error:
            errors.fail(errors.StateFileError, str(self.path), str(error))
        return tensor

    def _open(self) -> Any:
        if self._opened is None:
            if not self.path.is_file():
                errors.fail(errors.StateFileError, str(self.path), "it is not there, or no file")
            try:
                self._opened = _library().safe_open(self.path, framework="pt")
            except _library_errors() as error:
                errors.fail(errors.StateFileError, str(self.path), str(error))
        return self._opened


def _homes(path: Path) -> dict[str, _File]:
    """Return for each name the file that holds it."""
    _library()  # before anything else is wrong
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".json"):
        return _in_index(path)
    file = _File(path)
    return dict.fromkeys(file.names(), file)


def _in_folder(folder: Path) -> Path:
    index = folder / f"model{INDEX}"
    if index.is_file():
        return index
    found = sorted(folder.glob(f"*{ENDING}"))
    if len(found) != 1:
        names = [path.name for path in found] or "no .safetensors file"
        cause = f"the folder has no {index.name}, and holds {names}"
        errors.fail(errors.StateFileError, str(folder), cause)
    return found[0]


def _in_index(path: Path) -> dict[str, _File]:
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        files = {shard: _File(path.parent / shard) for shard in names.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        cause = f"it is no index of shards ({type(error).__name__}: {error})"
        errors.fail(errors.StateFileError, str(path), cause)
    missing = sorted(shard for shard, file in files.items() if not file.path.is_file())
    if missing:
        errors.fail(errors.StateFileError, str(path), f"these shards are not there: {missing}")
    return {name: files[shard] for name, shard in names.items()}


def _library() -> Any:
    try:
        import safetensors
    except ImportError:
        errors.fail(errors.MissingExtraError, "fcall.open_state", "safetensors", "state")
    return safetensors


def _library_errors() -> tuple[type[Exception], ...]:
    """Return what comes of bad files; of a dtype that torch has not, an ``AttributeError``."""
    return _library().SafetensorError, OSError, ValueError, AttributeError
