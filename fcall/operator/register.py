"""Teaching Dynamo the operators, at the first trace."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from fcall import _torch, errors

__all__ = ["problem_with_dynamo"]


@_torch.evaluated_while_tracing
def problem_with_dynamo() -> str:
    """Return why Dynamo cannot trace the operators, or an empty string if it can."""
    return _register()


@functools.cache
def _register() -> str:
    # Warns once, for it runs once.
    problem = _torch.OPERATOR_PROBLEM
    if not problem:
        try:
            importlib.import_module("fcall.operator.dynamo")
        except _torch.DynamoUnavailableError as error:
            problem = str(error)
    if not problem:
        return ""
    reason = f"torch {torch.__version__} lacks what the operator needs ({problem})"
    warnings.warn(
        f"fcall: {reason}. Calls are inlined into the compiled graph: results are the same, but "
        "the graph does not show them as one node. fcall supports torch 2.11 to 2.15.",
        errors.FcallWarning,
        stacklevel=2,
    )
    return reason
