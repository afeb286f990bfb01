"""What is to be remembered of a compilation, so that another process can do without it."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fcall._torch import compiling

__all__ = ["Record", "Trace"]


@dataclasses.dataclass
class Trace:
    """What a trace read and gave, apart from the code that it gave."""

    compiled: Any
    """What Inductor made of the graph."""
    is_static: bool
    """Whether the graph is for tensors of one size alone."""
    libraries: dict[str, bytes]
    """The C++ that was built for it, by file names within the folder that Inductor uses."""
    guards: list[tuple[Any, Callable[..., None]]]
    """Source and kind of each of Dynamo's guards that are kept."""
    settings: dict[str, Any]
    """What else guards are made from."""
    imports: dict[str, str]
    """The modules that the code and the guards find in globals, by the names there."""
    codes: list[CodeType]
    """The code of all functions that were traced."""


class Record(threading.local):
    """Sees the compilations of one frame; each thread sees its own."""

    _compiled: tuple[Any, bool, dict[str, bytes]] | None = None
    _output: Any = None
    _trace: Trace | None = None

    def compile(
        self, inductor: Callable[[GraphModule, Any], Any], graph: GraphModule, inputs: Sequence[Any]
    ) -> Any:
        """Return what ``inductor`` makes of a graph, in a form that can be kept."""
        torchs = compiling.artifacts()
        before = set(torchs.libraries)
        with torchs.to_be_dumped():
            compiled = inductor(graph, inputs)
        built = dict(_libraries(key for key in list(torchs.libraries) if key not in before))
        self._compiled = compiled, all(map(_is_static, inputs)), built
        self._output = torchs.output_of_trace()
        return compiled

    def see_guards(self, entries: Sequence[Any]) -> list[bool]:
        """Take note of the guards of the compilation, which are made after it, and keep them all.

        A filter for guards, to ``torch.compile``.
        """
        output, self._output = self._output, None
        if output is None or self._compiled is None:
            return [True] * len(entries)
        guards = [entry.orig_guard for entry in entries]
        self._trace = Trace(
            *self._compiled,
            guards=[(g.originating_source, _without_references(g.create_fn)) for g in guards],
            settings={
                "guard_on_key_order": set(output.guard_on_key_order),
                "input_source_to_sizes_strides": dict(output.input_source_to_sizes_strides),
                "name_of_builtins_dict_key_in_fglobals": (
                    output.name_of_builtins_dict_key_in_fglobals
                ),
            },
            imports=dict(output.import_sources),
            codes=list(output.traced_code),
        )
        return [True] * len(entries)

    def take(self) -> Trace | None:
        """Return what the latest compilation was, once."""
        trace, self._trace, self._compiled = self._trace, None, None
        return trace


def _is_static(value: Any) -> bool:
    return isinstance(value, Tensor) and all(
        type(number) is int for number in (*value.shape, *value.stride(), value.storage_offset())
    )


def _without_references(create: Callable[..., None]) -> Callable[..., None]:
    """Return how a guard is made, without the tensor that it was made for."""
    if isinstance(create, functools.partial):
        named = {key: value for key, value in create.keywords.items() if key != "value"}
        return functools.partial(create.func, *create.args, **named)
    return create


def _libraries(keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    folder = Path(compiling.artifacts().cache_dir())
    for key in keys:
        for path in (folder / key[1:3]).glob(f"{key}.*so"):
            yield str(path.relative_to(folder)), path.read_bytes()
