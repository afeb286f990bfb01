"""Every mistake a caller can make, one class each, with the message on the class.

Each class also derives from the builtin that ``torch.func.functional_call`` raises in the same
case, so an ``except ValueError`` keeps working when the import changes. What a class is made with
is listed after "Details" in its docstring, and kept as ``error.details``.
"""

from __future__ import annotations

from fcall.error_base import FcallError, FcallWarning
from fcall.error_base import fail as fail
from fcall.error_base import fail_while_tracing as fail_while_tracing
from fcall.error_base import nearest as nearest

__all__ = [
    "BakedStateError",
    "DuplicateNameError",
    "FcallError",
    "FcallWarning",
    "FunctionalizeOptionError",
    "GraphChangedError",
    "InPlaceUnderTransformError",
    "InvalidDictsError",
    "InvalidNameError",
    "LazyModuleError",
    "LossError",
    "MetaTensorError",
    "MissingExtraError",
    "MissingValuesError",
    "MissingWeightsError",
    "ModelHasBuffersError",
    "NoModelsError",
    "NotAModuleError",
    "NotAPackageError",
    "NotATensorError",
    "NotATensorSlotError",
    "NotPackagedError",
    "PackageDamagedError",
    "PackageMismatchError",
    "PackageNameError",
    "PackedSequenceError",
    "PatchNotStartedError",
    "PathThroughValueError",
    "ProgramInputsError",
    "ProgramStructureError",
    "ReadOnlyAttributeError",
    "ReadOnlyMappingError",
    "SharedSlotError",
    "StateChangedError",
    "StateDtypeError",
    "StateFileError",
    "StrictKeysError",
    "TangentsError",
    "TiedValuesError",
    "UnexpectedWeightsError",
    "UnknownMethodError",
    "UnknownPathError",
    "UnknownPrefixError",
    "UnlikeModelsError",
    "UnsupportedModuleError",
    "ValuesCountError",
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


class MissingValuesError(FcallError, RuntimeError):
    """An exported graph would own state of the module. Details: the module's type, the names."""

    template = (
        "export needs a value for every parameter and buffer of {}, so that the graph's caller "
        "gives all of them. Missing: {}. For example pass "
        "{{**dict(module.named_parameters()), **dict(module.named_buffers()), **params}}."
    )


class StateChangedError(FcallError, RuntimeError):
    """An exported module reassigns a tensor with another one. Details: name, before, after."""

    template = (
        "the module reassigns {!r}, from {} to {}. An exported graph writes new state into the "
        "tensors it was given, so shape and dtype have to stay the same."
    )


class MissingWeightsError(FcallError, KeyError):
    """A graph was given no value for some of its weights. Details: what it computes, the names."""

    template = (
        "the graph of {} takes values for {}, which were not given. Pass them by name, as in "
        "{{**dict(module.named_parameters()), **dict(module.named_buffers())}}."
    )


class UnexpectedWeightsError(FcallError, KeyError):
    """A graph was given unknown names. Details: what it computes, names, known names, prefix.

    The prefix is one without which the names are known, or empty.
    """

    def describe(self, title: str, names: list[str], known: list[str], prefix: str = "") -> str:
        """Return the message."""
        if prefix:
            names = sorted(map(str, names))
            first = ", ".join(map(repr, names[:3]))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return (
                f"the graph of {title} has no inputs named {first}{more}; they would fit "
                f"with the prefix {prefix!r} removed: open_state(path, prefix={prefix!r})."
            )
        keys = ", ".join(f"{name!r}{nearest(str(name), known)}" for name in sorted(map(str, names)))
        return f"the graph of {title} has no inputs named {keys}. It has: {sorted(known)}."


class ProgramInputsError(FcallError, ValueError):
    """A graph was given other tensors than it is for. Details: what it computes, the problems."""

    def describe(self, title: str, problems: list[str]) -> str:
        """Return the message."""
        lines = [f"the graph of {title} is for other inputs than it was given:", *problems]
        return "\n\t".join(lines)


class ProgramStructureError(FcallError, ValueError):
    """A graph was given arguments nested otherwise. Details: what it computes, expected, given."""

    template = (
        "the graph of {} is called as it was traced: positional arguments by position, keyword "
        "arguments by name, nested in the same way. Expected (params, {}), given (params, {})."
    )


class BakedStateError(FcallError, RuntimeError):
    """State that was to be a constant of a graph is changed. Details: module's type, the names."""

    template = (
        "{} changes {}, which bake_rest=True makes constants of the graph. Give values for these "
        "names, or leave bake_rest out, so that they are inputs."
    )


class GraphChangedError(FcallError, ValueError):
    """A graph put into a Program has other inputs or outputs. Details: what differs."""

    template = (
        "this graph does not fit the Program: {}. A pass may change what is computed, but has to "
        "leave placeholders and outputs as they are, in their order."
    )


class LossError(FcallError, ValueError):
    """What is to be differentiated is no real number. Details: what it computes, what was got."""

    template = (
        "the gradients of {} need a loss that is one real number, but it is {}. Pass "
        "loss=a function of the output that returns a tensor with one element."
    )


class PackageNameError(FcallError, ValueError):
    """A package was to be written under another name. Details: the path."""

    template = "a package is a file whose name ends in .pt2, but got {!r}."


class NotAPackageError(FcallError, ValueError):
    """A file is no package of fcall's. Details: the path, what was found."""

    template = (
        "{} is not a package that fcall.package wrote: {}. Other packages of AOTInductor are "
        "loaded by torch._inductor.aoti_load_package."
    )


class PackageDamagedError(FcallError, ValueError):
    """A package is not as it was written. Details: the path, what was found."""

    template = "{} is damaged: {}. Copy it again, or make it anew with fcall.package."


class PackageMismatchError(FcallError, RuntimeError):
    """A package is for something else. Details: the path, the differences."""

    def describe(self, path: str, differences: list[str]) -> str:
        """Return the message."""
        lines = [f"{path} cannot run here. Make it anew with fcall.package.", *differences]
        return "\n\t".join(lines)


class NotPackagedError(FcallError, RuntimeError):
    """A package was asked for what it cannot do. Details: what."""

    template = (
        "a package is compiled code, with no rules for {}. Call the Program it was made of, or, "
        "where only the values matter, pass plain tensors, under torch.no_grad()."
    )


class MissingExtraError(FcallError, ImportError):
    """A package is not installed. Details: what needs it, its name, the extra that has it."""

    template = "{} needs the package {!r}, which is not installed: pip install 'fcall[{}]'."


class StateFileError(FcallError, ValueError):
    """A file with weights cannot be read. Details: the path, what was found."""

    template = (
        "{} cannot be read as weights: {}. open_state takes a .safetensors file, the "
        ".safetensors.index.json of a sharded one, or a folder with either."
    )


class UnknownPrefixError(FcallError, ValueError):
    """No name in a file has the prefix. Details: the path, the prefix, the prefixes there are."""

    def describe(self, path: str, prefix: str, known: list[str]) -> str:
        """Return the message."""
        there = f"It has names with: {known}" if known else "Its names have no prefixes"
        return (
            f"{path} has no names with the prefix {prefix!r}{nearest(prefix, known)}. {there}. A "
            "prefix ends with a dot."
        )


class StateDtypeError(FcallError, TypeError):
    """Weights were to be read in no floating dtype. Details: what was given."""

    template = (
        "open_state(dtype=...) converts floating tensors to another floating dtype, such as "
        "torch.bfloat16, but got {}."
    )


class ModelHasBuffersError(FcallError, RuntimeError):
    """``make_functional`` got a model with buffers. Details: its type, the buffers' names."""

    template = (
        "make_functional is for models without buffers, but {} has {}. Use "
        "make_functional_with_buffers, or better fcall.functional_call."
    )


class ValuesCountError(FcallError, ValueError):
    """A function of make_functional got another number of tensors. Details: what, needed, got."""

    template = (
        "the function takes {1} {0}, but got {2}. Pass the {0} that were returned with it, or as "
        "many others, in the same order."
    )


class PatchNotStartedError(FcallError, RuntimeError):
    """``stop()`` was called more often than ``start()``. Details: none."""

    template = (
        "this patch_torch() is not started, so there is nothing to stop. Keep the object that you "
        "started: patch = fcall.patch_torch(); patch.start(); ...; patch.stop()."
    )


class InPlaceUnderTransformError(FcallError, RuntimeError):
    """A module wrote into what a transform shares. Details: module's type, buffers, torch's words.

    Raised from torch's own error. The advice depends on whether torch's words are about ``vmap``.
    """

    def describe(self, module: str, buffers: list[str], cause: str) -> str:
        """Return the message."""
        under_vmap = "vmap" in cause or "batched" in cause
        what, advice = _UNDER_VMAP if under_vmap else _UNDER_GRAD
        named = f" Its buffers are {buffers}." if buffers else ""
        return f"{module} writes in place under {what}.{named} {advice} torch says: {cause}"


class PackedSequenceError(FcallError, RuntimeError):
    """An RNN computed step by step was given a packed sequence. Details: none."""

    template = (
        "an RNN was given a packed sequence under vmap, in forward mode, or in a compiled function "
        "that needs gradients. torch.lstm and its kin have no rules for these, so that fcall "
        "computes padded sequences step by step in their stead. Give the RNN a padded sequence, "
        "and mask what it returns beyond each length."
    )


_UNDER_GRAD = (
    "a transform, which refuses to write into a tensor captured from around it",
    "Pass the buffers as an argument of the transformed function, as in "
    "grad(f)(params, buffers, x); or copy them in it and return the copies as aux.",
)
_UNDER_VMAP = (
    "vmap, which cannot write results of all its members into a tensor that they share",
    "Stack the buffers and map over them, as in vmap(f)(params, buffers, x); or take the running "
    "statistics from batch norms with fcall.func.replace_all_batch_norm_modules_(module).",
)


class TangentsError(FcallError, RuntimeError):
    """Tangents are not like the primals. Details: what differs, what was got, what was expected."""

    template = (
        "the tangents given to the function that linearize returned are not like the primals: "
        "the {} is {}, but {} was expected."
    )


class FunctionalizeOptionError(FcallError, RuntimeError):
    """``functionalize`` was told to remove something else. Details: what."""

    template = (
        "functionalize removes 'mutations' or 'mutations_and_views', but got the invalid argument "
        "remove={!r}."
    )


class NoModelsError(FcallError, RuntimeError):
    """There are no models to be stacked. Details: none."""

    template = "stack_module_state: Expected at least one model, got 0."


class UnlikeModelsError(FcallError, RuntimeError):
    """Models to be stacked differ. Details: index of the model, in what, there, in the first."""

    template = (
        "models[{}] can't be stacked with models[0]: {} is {}, but {} in models[0]. Stack models "
        "that differ in nothing but the values of their parameters and buffers."
    )
