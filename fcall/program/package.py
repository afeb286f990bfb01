"""``package`` and ``load``: a Program compiled ahead of time, to a file that takes its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fcall import _torch, errors
from fcall._torch import ahead
from fcall.binding import TENSORS
from fcall.program.archive import add_record, environment, read_record, refuse_other_environment
from fcall.program.exported import export_traced
from fcall.program.graph_call import GraphCall, WeightsOrPath
from fcall.program.program import Program
from fcall.program.signature import Signature, evaluate

__all__ = ["Runner", "load", "package"]


def package(
    program: Program, path: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None
) -> Path:
    """Compile ``program`` with AOTInductor, to a file that runs without the module and its code.

    Args:
        program: What :func:`fcall.trace` returned. All its tensors have to be on one device.
        path: The file to write; its name ends in ``.pt2``. Replaced, at once, when all is done.
        options: Settings of Inductor, as for ``torch.compile(options=...)``.

    Returns:
        The path.

    Raises:
        ValueError: the name of the file does not end in ``.pt2``.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        errors.fail(errors.PackageNameError, str(path))
    traced, signature = program._traced, program.signature
    devices = {spec.device for spec in signature.inputs if spec.device is not None}
    device = next(iter(devices), torch.device("cpu"))
    # Only tensors leave a package; what else there is, the record tells.
    exported = export_traced(traced, lambda *result: _tensors(result[:2]))
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        ahead.package_aoti(exported, str(unfinished), dict(options or {}))
        record = {
            "environment": environment(device),
            "signature": signature.to_json(),
            "outputs": _described_outputs(program),
            "out_spec": _torch.pytree.treespec_dumps(traced.out_spec),
        }
        add_record(unfinished, record, program.defaults)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load(path: str | os.PathLike[str], *, num_runners: int = 1, device_index: int = -1) -> Runner:
    """Load what :func:`package` wrote.

    A package is code: it is run, and has to be trusted as an installed library is. What can be
    found out before, is: that it is one, whole, and for this torch and this machine.

    Args:
        path: The file.
        num_runners: How many calls, from as many threads, can run at once. Each has memory for
            temporary tensors of its own.
        device_index: The number of the CUDA device; ``-1`` for the current one.

    Raises:
        FileNotFoundError: there is no such file.
        NotAPackageError: it is none of fcall's (a ``ValueError``).
        PackageDamagedError: it was cut off or changed (a ``ValueError``).
        PackageMismatchError: it was made by another torch, or for another device, system, or kind
            of CPU (a ``RuntimeError``).
    """
    path = Path(path)
    record, defaults = read_record(path)
    refuse_other_environment(path, record["environment"])
    run = ahead.load_aoti(str(path), num_runners, device_index)
    return Runner(run, record, defaults)


class Runner(GraphCall):
    """A package, to be called as ``runner(params, *args, **kwargs)``, by many threads at once."""

    def __init__(
        self,
        run: Callable[[list[Tensor]], list[Tensor]],
        record: Mapping[str, Any],
        defaults: Mapping[str, Tensor],
    ) -> None:
        super().__init__(Signature.from_json(record["signature"]), defaults)
        self.environment: Mapping[str, Any] = record["environment"]
        """What it was made with, and for."""
        self._run = run
        self._outputs: list[dict[str, Any]] = record["outputs"]
        self._out_spec = _torch.pytree.treespec_loads(record["out_spec"])

    def __call__(
        self, parameter_and_buffer_dicts: WeightsOrPath, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the package, as :meth:`fcall.Program.__call__` runs a graph.

        There are no gradients, and it takes no part in transforms: for these, call the Program.

        Raises:
            NotPackagedError: a tensor needs gradients while they are recorded, or is none with
                memory of its own: in a transform, in a trace, of a subclass (``RuntimeError``).
            ProgramInputsError: a tensor has another shape, dtype, device or layout than it was
                traced with (a ``ValueError``).
            FcallError: the others of :meth:`fcall.Program.__call__`.
        """
        weights = self._opened(parameter_and_buffer_dicts)
        flat = self._flatten(weights, args, kwargs)
        sizes = self.signature.sizes(flat)
        self._check(flat, sizes)
        with torch.no_grad():
            tensors = iter(self._run([value for value in flat if isinstance(value, Tensor)]))
        leaves = [_output(described, tensors, sizes) for described in self._outputs]
        out, state = _torch.pytree.tree_unflatten(leaves, self._out_spec)
        self._write_back(weights, state)
        return out

    run = __call__

    def _check(self, flat: Sequence[Any], sizes: Mapping[str, int]) -> None:
        """Check what the compiled code takes for granted, beyond what a graph needs."""
        if any(type(v) not in TENSORS for v in flat if isinstance(v, Tensor)):
            kinds = {type(v).__name__ for v in flat if isinstance(v, Tensor)} - {"Tensor"}
            errors.fail(errors.NotPackagedError, f"tensors of the class {min(kinds)}")
        if _torch.in_functorch_transform() or _torch.in_proxy_mode():
            errors.fail(errors.NotPackagedError, "transforms and traces")
        specs = self.signature.inputs
        if torch.is_grad_enabled():
            names = [
                s.name for s, v in zip(specs, flat) if isinstance(v, Tensor) and v.requires_grad
            ]
            if names:
                errors.fail(errors.NotPackagedError, f"gradients, which {names} need")
        problems = []
        for spec, value in zip(specs, flat):
            if isinstance(value, Tensor):
                expected = tuple([evaluate(step, sizes) for step in spec.stride])
                if not _same_layout(value, expected):
                    problems.append(
                        f"{spec.name}: expected strides {expected}, given {value.stride()}; "
                        "pass a copy with these, for most tensors value.contiguous()"
                    )
        if problems:
            errors.fail(errors.ProgramInputsError, self.signature.title, problems)


def _same_layout(value: Tensor, expected: tuple[int, ...]) -> bool:
    if value.layout != torch.strided:
        return False
    if value.stride() == expected or not value.numel():
        return True
    pairs = zip(value.stride(), expected, value.shape)
    return all(step == other for step, other, size in pairs if size > 1)


def _described_outputs(program: Program) -> list[dict[str, Any]]:
    """Return for each leaf of the output whether it is a tensor, a size, or a constant."""
    [output] = program.graph_module.graph.find_nodes(op="output")
    described: list[dict[str, Any]] = []
    for value in output.args[0]:
        example = value.meta["val"] if isinstance(value, Node) else value
        if isinstance(example, Tensor):
            described.append({"kind": "tensor"})
        elif isinstance(value, Node):
            described.append({"kind": "size", "value": str(example)})
        elif value is None or isinstance(value, (bool, int, float, str)):
            described.append({"kind": "constant", "value": value})
        else:
            errors.fail(errors.NotPackagedError, f"outputs that are a {type(value).__name__}")
    return described


def _output(
    described: Mapping[str, Any], tensors: Iterator[Tensor], sizes: Mapping[str, int]
) -> Any:
    if described["kind"] == "tensor":
        return next(tensors)
    value = described["value"]
    return evaluate(value, sizes) if described["kind"] == "size" else value


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return tuple([v for v in _torch.pytree.tree_leaves(outputs) if isinstance(v, Tensor)])
