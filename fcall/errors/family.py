"""Mistakes with the rest of the family: transforms, ensembles, older names."""

from __future__ import annotations

from fcall.errors.base import FcallError

__all__ = [
    "FunctionalizeOptionError",
    "InPlaceUnderTransformError",
    "ModelHasBuffersError",
    "NoModelsError",
    "PackedSequenceError",
    "PatchNotStartedError",
    "TangentsError",
    "UnlikeModelsError",
    "ValuesCountError",
]


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
        under_vmap = any(word in cause for word in ("vmap", "batched", "broadcast"))
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
