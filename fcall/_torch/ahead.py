"""The private modules of torch that :mod:`fcall.program` needs, to export and package calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

__all__ = [
    "fake_mode",
    "load_aoti",
    "package_aoti",
    "with_backward",
]


def fake_mode() -> Any:
    """Return a mode in which tensors are made that hold no memory, on any device.

    ``torch.export`` takes them as examples. No public name yet.
    """
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def with_backward(program: ExportedProgram) -> ExportedProgram:
    """Return ``program``, whose first output is a loss, with the gradients as further outputs.

    They are in the order of the inputs that need gradients. Goes when that has a public name.
    """
    from torch.export.experimental import _export_forward_backward

    # It takes all inputs for tensors. Those that are none have no part in the graph.
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    in_place_of_others = next(v for v in values if isinstance(v, torch.Tensor)).new_empty(())
    for node, value in zip(program.graph.find_nodes(op="placeholder"), values):
        node.meta["val"] = value if isinstance(value, torch.Tensor) else in_place_of_others
    program = _export_forward_backward(program)
    for node, value in zip(program.graph.find_nodes(op="placeholder"), values):
        node.meta["val"] = node.meta["val"] if isinstance(value, torch.Tensor) else value
    return program


def package_aoti(program: ExportedProgram, path: str, options: dict[str, Any]) -> None:
    """Compile ``program`` to a package. torch documents it under this name, which is private."""
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def load_aoti(
    path: str, num_runners: int, device_index: int
) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Return a function that runs the package at ``path`` on its tensors, in their order."""
    # torch documents torch._inductor.aoti_load_package, which calls this with one runner.
    from torch._inductor.package import load_package

    loaded = load_package(path, num_runners=num_runners, device_index=device_index)
    return loaded.loader.run  # type: ignore[no-any-return]
