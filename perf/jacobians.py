"""What do Jacobians and Hessian-vector products with respect to the parameters cost?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fcall
from perf import bench
from perf.models import CALLS, backend, lean, mlp, random, weights_for

PANELS = ("jacrev", "jacfwd", "Hessian-vector product")
WIDTHS = (8, 32, 128)
TRANSFORMS = {"torch.func": torch.func, "fcall": fcall.func}


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    for panel in PANELS[::2] if quick else PANELS:
        # Forward mode goes once through the model for each number in a parameter.
        for width in WIDTHS[: 1 if quick else 2 if panel == "jacfwd" else 3]:
            torch.compiler.reset()
            module, x = mlp(4, width, width, 3), random(8, 4)
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
                from perf import peers as others

                contenders |= others.jacobians(module, weights, x, panel)
            rows += bench.measure(contenders, panel=panel, n=width, quick=quick)
    return bench.record(__doc__, "width", rows)


def _call(call: Callable[..., Any], module: Any, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return call(module, weights, (x,))  # type: ignore[no-any-return]


def _function(panel: str, func: Any, model: Callable[..., Any]) -> Callable[..., Any]:
    if panel == "Hessian-vector product":
        grad = func.grad(lambda weights: model(weights).square().mean())
        return lambda weights, vector: func.jvp(grad, (weights,), (vector,))[1]
    jacobian = getattr(func, panel)(model)
    return lambda weights, vector: jacobian(weights)


if __name__ == "__main__":
    bench.run("jacobians", main)
