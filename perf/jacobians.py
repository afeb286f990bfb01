"""What do Jacobians, Jacobian-vector and Hessian-vector products of parameters cost?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fcall
from perf import bench, ceilings
from perf.models import CALLS, backend, lean, mlp, random, weights_for
from perf.peers import ask
from perf.timing import DEVICE

PRODUCTS = ("Jacobian-vector product", "Hessian-vector product")
PANELS = {"quick": ("jacrev", *PRODUCTS), "cpu": ("jacrev", "jacfwd", *PRODUCTS), "cuda": PRODUCTS}
WIDTHS = {"quick": (8,), "cpu": (8, 32, 128), "cuda": (1024, 4096)}
SIZES = {"quick": (8, 4, 3), "cpu": (8, 4, 3), "cuda": (256, 256, 64)}
"""Samples, inputs and outputs."""
TRANSFORMS = {"torch.func": torch.func, "fcall": fcall.func}


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    limits = ceilings.measure(quick=quick)
    where = "quick" if quick else DEVICE.type
    samples, inputs, outputs = SIZES[where]
    for panel in PANELS[where]:
        # Forward mode goes once through the model for each number in a parameter.
        for width in WIDTHS[where][: 2 if panel == "jacfwd" else 3]:
            torch.compiler.reset()
            module, x = mlp(inputs, width, width, outputs), random(samples, inputs)
            weights = weights_for(module)
            vector = {name: torch.ones_like(w) for name, w in weights.items()}
            contenders: dict[str, Any] = {}
            for name, call in CALLS.items():
                fn = _function(panel, TRANSFORMS[name], partial(_call, call, module, x))
                # Not one graph: torch.func's own may break it.
                compiled = torch.compile(fn, backend=backend(quick))
                contenders[name] = partial(fn, weights, vector)
                contenders[f"{name}, compiled"] = partial(compiled, weights, vector)
            compiled = lean(module, contenders["fcall"].func, weights, quick)
            contenders["fcall.compile"] = partial(compiled, vector)
            if peers:
                contenders |= ask("JAX", "jacobians", module, weights, x, panel)
            eager = contenders["torch.func"]
            work = limits.work(eager, weights, vector if panel in PRODUCTS else (), eager())
            rows += bench.measure(contenders, panel=panel, n=width, quick=quick, work=work)
    return bench.record(__doc__, "width", rows, ceilings=limits)


def _call(call: Callable[..., Any], module: Any, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return call(module, weights, (x,))  # type: ignore[no-any-return]


def _function(panel: str, func: Any, model: Callable[..., Any]) -> Callable[..., Any]:
    if panel == "Jacobian-vector product":
        return lambda weights, vector: func.jvp(model, (weights,), (vector,))[1]
    if panel == "Hessian-vector product":
        grad = func.grad(lambda weights: model(weights).square().mean())
        return lambda weights, vector: func.jvp(grad, (weights,), (vector,))[1]
    jacobian = getattr(func, panel)(model)
    return lambda weights, vector: jacobian(weights)


if __name__ == "__main__":
    bench.run("jacobians", main)
