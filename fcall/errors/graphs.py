"""Mistakes with what is prepared ahead of time: traces, exports, packages, caches."""

from __future__ import annotations

from fcall.errors.base import FcallError, nearest

__all__ = [
    "BakedStateError",
    "ExportedGradientError",
    "GraphChangedError",
    "KernelsUnavailableError",
    "LossError",
    "MissingValuesError",
    "MissingWeightsError",
    "NotAPackageError",
    "NotOnCudaError",
    "NotPackagedError",
    "PackageDamagedError",
    "PackageMismatchError",
    "PackageNameError",
    "ProgramInputsError",
    "ProgramStructureError",
    "StateChangedError",
    "StaticSetsError",
    "UncachedBackendError",
    "UnexpectedWeightsError",
]


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


class ExportedGradientError(FcallError, RuntimeError):
    """Gradients are taken inside of an exported function. Details: what is called."""

    template = (
        "{} is called in grad, vjp, jacrev or hessian while torch.export records, which takes the "
        "values of the examples for constants there, and would make a graph that is wrong for all "
        "others. Trace first, and export the traced graph: "
        "fcall.trace(module, params, args).joint(loss).exported(); or for any function f "
        "torch.export.export(make_fx(f)(*args), args), make_fx from "
        "torch.fx.experimental.proxy_tensor."
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


class UncachedBackendError(FcallError, ValueError):
    """``cache`` is given to ``fcall.compile`` with a backend that cannot be kept. Details: it."""

    template = (
        "fcall.compile keeps on disk what backend='inductor' compiles, without the options "
        "'guard_filter_fn', 'size_asserts' and 'use_aoti'; it was given backend={0!r}. Leave out "
        "cache, or these."
    )


class StaticSetsError(FcallError, ValueError):
    """``static_sets`` of ``fcall.compile`` is no number, or of no use. Details: it."""

    template = (
        "static_sets is how many sets of weights have a CUDA graph of their own: a number from 0, "
        "where CUDA graphs are recorded, as with backend='inductor' and mode='reduce-overhead'. It "
        "is {0!r}, {1}. Leave it out, or ask for CUDA graphs."
    )


class KernelsUnavailableError(FcallError, RuntimeError):
    """CUDA code cannot be generated here. Details: why."""

    template = (
        "no CUDA code can be generated here: {}. Install the Triton that was made for this torch; "
        "for torch 2.13: pip install triton==3.7.1, on Linux."
    )


class NotOnCudaError(FcallError, ValueError):
    """A graph traced on the CPU is not what it would be on CUDA. Details: what in it is not."""

    def describe(self, found: list[str]) -> str:
        """Return the message."""
        return (
            "CUDA code is generated from a graph that was traced on the CPU, and in this one are "
            f"things that would be otherwise on CUDA: {', '.join(found)}. Instead of "
            "scaled_dot_product_attention write matmuls and a softmax; pass tensors that are made "
            "of numbers as arguments."
        )
