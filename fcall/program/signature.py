"""What a graph takes: each input by name, and the check of what it is given.

The order of a graph's flat inputs is that of :attr:`Signature.inputs`: the weights in the order of
:attr:`Signature.names`, then the leaves of ``(args, kwargs)``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fcall import _torch, errors
from fcall.prefixes import fitting_prefix

__all__ = ["Input", "Signature", "Size", "evaluate"]

Size = int | str
"""A size of a tensor: a number, or the name of a dynamic one, or an expression of such names."""


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of a graph."""

    name: str
    """The name of the parameter or buffer; of any other input that of its placeholder."""
    placeholder: str
    """The name of its placeholder in the graph."""
    kind: str
    """``"parameter"``, ``"buffer"``, ``"input"``, or ``"constant"`` for what is no tensor."""
    shape: tuple[Size, ...] = ()
    """The sizes; of a dynamic one its name, for which :attr:`Signature.ranges` has the range."""
    stride: tuple[Size, ...] = ()
    """The strides of the example."""
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    value: Any = None
    """The value of a constant, with which alone the graph can be called."""
    tied: tuple[str, ...] = ()
    """Other names of the same tensor."""
    changed: str = ""
    """``"in place"`` or ``"reassigned"`` if the graph changes it, else empty."""
    has_default: bool = False
    """Whether it can be left out."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of a weight, tied ones too."""
        return self.name, *self.tied

    @property
    def is_weight(self) -> bool:
        """Whether it is given by name."""
        return self.kind in ("parameter", "buffer")

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"{self.placeholder}={self.value!r}"
        sizes = ", ".join(map(str, self.shape))
        return (
            f"({sizes}{',' if len(self.shape) == 1 else ''}) {_short(self.dtype)} on {self.device}"
        )


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs of a graph."""

    title: str
    """What the graph computes, for error messages: the name of the module's class."""
    inputs: tuple[Input, ...]
    """All inputs, in the order of the placeholders."""
    ranges: Mapping[str, tuple[int, int | None]]
    """Smallest and largest size, by the name of a dynamic size; None for no limit."""
    hints: Mapping[str, int]
    """A size with which it was traced, by the name of a dynamic size."""
    spec: Any
    """The ``TreeSpec`` of ``(args, kwargs)``."""
    arg_names: tuple[str, ...]
    """A name for each of ``args``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of parameters and buffers, in the order of their placeholders."""
        return tuple([spec.name for spec in self.inputs if spec.is_weight])

    @property
    def placeholders(self) -> list[str]:
        """The names of all placeholders."""
        return [spec.placeholder for spec in self.inputs]

    @property
    def weights(self) -> tuple[Input, ...]:
        """The parameters and buffers."""
        return tuple([spec for spec in self.inputs if spec.is_weight])

    def flatten(
        self,
        given: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> list[Any]:
        """Return all inputs in order, checked.

        Args:
            given: Parameters and buffers by name, in any order; of tied names one or all.
            args: The positional arguments.
            kwargs: The keyword arguments.
            defaults: Values for names that are left out.

        Raises:
            MissingWeightsError: a name has no value.
            ProgramInputsError: a tensor has another shape, dtype or device, or a constant has
                another value.
            ProgramStructureError: the arguments are nested otherwise.
            TiedValuesError: tied names have different values.
            UnexpectedWeightsError: a name is not known.
        """
        weights = self._weights(given, defaults)
        order = self.spec.child(1).context  # names of keyword arguments
        if kwargs.keys() == set(order):
            kwargs = {name: kwargs[name] for name in order}
        leaves, spec = _torch.pytree.tree_flatten((args, dict(kwargs)))
        if spec != self.spec:
            errors.fail(
                errors.ProgramStructureError, self.title, _outline(self.spec), _outline(spec)
            )
        flat = [*weights, *leaves]
        self._check(flat)
        return flat

    def unflatten(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` of what is no weight; constants are filled in.

        Args:
            inputs: The tensors, by the names of their placeholders.

        Raises:
            ProgramInputsError: one is missing, or not known.
        """
        specs = [spec for spec in self.inputs if not spec.is_weight]
        known = [spec.placeholder for spec in specs if spec.kind == "input"]
        problems = [f"{name}: not given" for name in known if name not in inputs]
        problems += [
            f"{name}: not known{errors.nearest(name, known)}"
            for name in inputs
            if name not in known
        ]
        if problems:
            errors.fail(errors.ProgramInputsError, self.title, problems)
        leaves = [s.value if s.kind == "constant" else inputs[s.placeholder] for s in specs]
        args, kwargs = _torch.pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def sizes(self, flat: Sequence[Any]) -> dict[str, int]:
        """Return the number for each dynamic size that is no expression."""
        return {
            size: number
            for spec, value in zip(self.inputs, flat)
            for size, number in zip(spec.shape, getattr(value, "shape", ()))
            if isinstance(size, str) and size.isidentifier()
        }

    def given_names(self, given: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return for each of :attr:`names` those under which it is given."""
        return {spec.name: [name for name in spec.names if name in given] for spec in self.weights}

    def _weights(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Any]:
        weights, missing, used = [], [], 0
        for spec in self.weights:
            names = [name for name in spec.names if name in given]
            used += len(names)
            if names:
                value = given[names[0]]
                if any(given[name] is not value for name in names):
                    errors.fail(errors.TiedValuesError, sorted(names), self.title)
                weights.append(value)
            elif spec.has_default:
                weights.append(defaults[spec.name])
            else:
                missing.append(spec.name)
        if used < len(given):
            known = [name for spec in self.weights for name in spec.names]
            unexpected = [name for name in given if name not in known]
            prefix = fitting_prefix(given, known)
            errors.fail(errors.UnexpectedWeightsError, self.title, unexpected, known, prefix)
        if missing:
            errors.fail(errors.MissingWeightsError, self.title, missing)
        return weights

    def _check(self, flat: Sequence[Any]) -> None:
        sizes: dict[str, int] = {}
        problems = []
        for spec, value in zip(self.inputs, flat):
            if spec.kind == "constant":
                if type(value) is not type(spec.value) or value != spec.value:
                    problems.append(f"{spec.placeholder}: expected {spec.value!r}, given {value!r}")
            elif not isinstance(value, Tensor):
                problems.append(f"{spec.name}: expected {spec}, given a {type(value).__name__}")
            elif not self._fits(spec, value, sizes):
                problems.append(f"{spec.name}: expected {spec}, given {_described(value)}")
        problems += self._size_problems(flat, sizes)
        if problems:
            errors.fail(errors.ProgramInputsError, self.title, problems)

    @staticmethod
    def _fits(spec: Input, value: Tensor, sizes: dict[str, int]) -> bool:
        """Whether ``value`` is as ``spec`` says, but for expressions; note dynamic sizes."""
        if value.dtype != spec.dtype or not _same_device(value.device, spec.device):
            return False
        if value.dim() != len(spec.shape):
            return False
        return all(
            size == expected
            if isinstance(expected, int)
            else not expected.isidentifier() or sizes.setdefault(expected, size) == size
            for size, expected in zip(value.shape, spec.shape)
        )

    def _size_problems(self, flat: Sequence[Any], sizes: dict[str, int]) -> list[str]:
        problems = []
        for name, size in sizes.items():
            low, high = self.ranges.get(name, (0, None))
            if size < low or (high is not None and size > high):
                users = ", ".join([s.name for s in self.inputs if name in s.shape])
                limit = "or more" if high is None else f"to {high}"
                problems.append(f"{users}: {name} has to be {low} {limit}, and is {size}")
        for spec, value in zip(self.inputs, flat):
            for size, expected in zip(getattr(value, "shape", ()), spec.shape):
                if isinstance(expected, str) and not expected.isidentifier():
                    number = evaluate(expected, sizes)
                    if number != size:
                        problems.append(f"{spec.name}: {expected} has to be {number}, not {size}")
        return problems

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` makes the same of."""
        return {
            "title": self.title,
            "inputs": [_input_to_json(spec) for spec in self.inputs],
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
            "hints": dict(self.hints),
            "spec": _torch.pytree.treespec_dumps(self.spec),
            "arg_names": list(self.arg_names),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Signature:
        """Return the signature that :meth:`to_json` returned ``record`` for."""
        return cls(
            title=record["title"],
            inputs=tuple([_input_from_json(one) for one in record["inputs"]]),
            ranges={name: (low, high) for name, (low, high) in record["ranges"].items()},
            hints=dict(record["hints"]),
            spec=_torch.pytree.treespec_loads(record["spec"]),
            arg_names=tuple(record["arg_names"]),
        )


def _input_to_json(spec: Input) -> dict[str, Any]:
    record = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    dtype, device = record["dtype"], record["device"]
    return {
        **record,
        "dtype": dtype and _short(dtype),
        "device": device and str(device),
        "value": _torch.pytree.tree_map(_constant_to_json, record["value"]),
    }


def _input_from_json(record: Mapping[str, Any]) -> Input:
    dtype, device = record["dtype"], record["device"]
    return Input(
        **{
            **record,
            "shape": tuple(record["shape"]),
            "stride": tuple(record["stride"]),
            "tied": tuple(record["tied"]),
            "dtype": dtype and getattr(torch, dtype),
            "device": device and torch.device(device),
        }
    )


def _constant_to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _same_device(device: torch.device, expected: torch.device | None) -> bool:
    if expected is None or device.type != expected.type:
        return False
    # A device without a number is the current one.
    return device == expected or device.index is None or expected.index is None


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """Return the number that ``size`` stands for.

    Raises:
        NameError: one of the sizes in an expression is not known.
    """
    if isinstance(size, int):
        return size
    if not re.fullmatch(r"[\w+\-*/%(), ]+", size):  # it may come from a file
        raise NameError(f"{size!r} is not an expression of sizes")
    return int(eval(size, {"__builtins__": {}}, {**FUNCTIONS, **sizes}))


FUNCTIONS: dict[str, Any] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
    "floor": math.floor,
    "ceiling": math.ceil,
}
"""What expressions of sizes may call."""


def _described(value: Tensor) -> str:
    return str(Input("", "", "input", tuple(value.shape), (), value.dtype, value.device))


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _outline(spec: Any) -> str:
    """Return the structure of arguments, as in ``(*, [*, *], k={'a': *})``."""
    args, kwargs = _torch.pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec)
    return ", ".join([*map(repr, args), *[f"{name}={value!r}" for name, value in kwargs.items()]])


class _Leaf:
    def __repr__(self) -> str:
        return "*"
