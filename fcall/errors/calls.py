"""Mistakes in a call: in the names, in the values, in the module."""

from __future__ import annotations

from fcall.errors.base import FcallError, nearest

__all__ = [
    "DuplicateNameError",
    "InvalidDictsError",
    "InvalidNameError",
    "LazyModuleError",
    "MetaTensorError",
    "NotAModuleError",
    "NotATensorError",
    "NotATensorSlotError",
    "PathThroughValueError",
    "ReadOnlyAttributeError",
    "ReadOnlyMappingError",
    "SharedSlotError",
    "StrictKeysError",
    "TiedValuesError",
    "UnknownMethodError",
    "UnknownPathError",
    "UnsupportedModuleError",
]


class InvalidDictsError(FcallError, ValueError):
    """The weights are neither a mapping nor a list or tuple of mappings. Details: what was got."""

    template = (
        "parameter_and_buffer_dicts must be a dict from names to tensors, or a list or tuple of "
        "such dicts, but got {}. Pass for example dict(module.named_parameters())."
    )


class DuplicateNameError(FcallError, ValueError):
    """The same name stands in two of the dicts. Details: the name."""

    template = "the key {!r} appeared in multiple dictionaries. Keep it in one of them."


class InvalidNameError(FcallError, KeyError):
    """A key is not a dotted name. Details: the key."""

    template = (
        "{!r} is not the name of a parameter or buffer: names are non-empty strings as in "
        "module.named_parameters(), with parts joined by single dots."
    )


class NotATensorError(FcallError, TypeError):
    """A value is neither a tensor nor like one. Details: the name, the value's type."""

    template = (
        "the value given for {!r} is not a tensor but a {}. Values must be torch.Tensor or "
        "implement __torch_function__; leave a name out to keep the module's own tensor."
    )


class NotATensorSlotError(FcallError, TypeError):
    """A key names an attribute that is not a tensor. Details: name, the module's and its types."""

    template = (
        "the attribute {!r} of {} is not a tensor but a {}. Only tensors can be substituted; "
        "pass other values as arguments."
    )


class UnknownPathError(FcallError, AttributeError):
    """A key leads through a submodule that does not exist. Details: type, name, known names."""

    def describe(self, module: str, name: str, known: list[str]) -> str:
        """Return the message."""
        return f"{module} has no submodule to which the key {name!r} leads{nearest(name, known)}."


class PathThroughValueError(FcallError, TypeError):
    """A key leads through what is no submodule. Details: the module's type, the key, part, type."""

    template = (
        "the key {1!r} leads through {2!r}, which in {0} is no submodule but a {3}. Names are "
        "those of module.named_parameters() and named_buffers()."
    )


class ReadOnlyAttributeError(FcallError, AttributeError):
    """A key names a property without a setter. Details: the key, the owner's type."""

    template = "can't set {!r}: it is a property of {} without a setter, and no tensor of its own."


class LazyModuleError(FcallError, RuntimeError):
    """A lazy module was given values for what it has not made yet. Details: the type, the names."""

    template = (
        "{} has lazy modules whose parameters are not made yet: {}. Called with values for them, "
        "they would turn into plain modules without parameters. Call the module once as it is, "
        "with an input of the right shape, and then functionally."
    )


class UnknownMethodError(FcallError, AttributeError):
    """``method`` names nothing callable. Details: the module's type, the method, known methods."""

    def describe(self, module: str, method: str, known: list[str]) -> str:
        """Return the message."""
        return f"{module} has no method {method!r} to call{nearest(method, known)}."


class TiedValuesError(FcallError, ValueError):
    """Tied names were given different values. Details: the names, the module's type."""

    template = (
        "functional_call got multiple values for keys {}, which are tied in {}. Give one of them, "
        "or the same tensor for each, or consider using tie_weights=False."
    )


class SharedSlotError(FcallError, ValueError):
    """Two paths to one tensor slot were given different values. Details: names, module's type."""

    template = (
        "functional_call got multiple values for keys {}, but in {} they are paths to one and the "
        "same submodule, so tie_weights=False cannot untie them. Give one of them, or the same "
        "tensor for each."
    )


class StrictKeysError(FcallError, RuntimeError):
    """Strict, and the names are not the module's. Details: type, missing, unexpected, known."""

    def describe(
        self, module: str, missing: list[str], unexpected: list[str], known: list[str]
    ) -> str:
        """Return the message."""
        lines = [f"Error(s) in reparametrizing for {module}:"]
        if unexpected:
            keys = ", ".join(f"{name!r}{nearest(name, known)}" for name in sorted(unexpected))
            lines.append(f"Unexpected key(s): {keys}.")
        if missing:
            keys = ", ".join(repr(name) for name in sorted(missing))
            lines.append(f"Missing key(s): {keys}.")
        return "\n\t".join(lines)


class MetaTensorError(FcallError, RuntimeError):
    """A tensor on meta is in a call with real ones. Details: module's type, whose it is, names."""

    template = (
        "{} has tensors on the meta device that were {}, while the call has real tensors: {}. "
        "A meta tensor holds no numbers; give a real value for each of these names."
    )


class NotAModuleError(FcallError, TypeError):
    """What is called is no ``nn.Module``. Details: its type."""

    template = "functional_call calls an nn.Module, but got a {}."


class UnsupportedModuleError(FcallError, RuntimeError):
    """The module's state cannot be substituted from Python. Details: what it is, what to do."""

    template = "functional_call can't be used with {}. {}"


class ReadOnlyMappingError(FcallError, TypeError):
    """A changed tensor came in a mapping that is read-only. Details: name, mapping's type."""

    template = (
        "the module changes {!r}, but the mapping it came in ({}) is read-only, so the new value "
        "cannot be written back. Pass a dict: dict(mapping), or dict(fcall.open_state(path))."
    )
