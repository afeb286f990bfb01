"""What do E models cost, called and trained: in a loop, under vmap, as an ``Ensemble``?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fcall
from perf import bench, ceilings
from perf.models import CALLS, backend, lean, mlp, random
from perf.peers import ask
from perf.timing import DEVICE

MEMBERS = {"cpu": (1, 4, 16, 64, 256), "cuda": (64,)}
SIZES = {"cpu": ((16, 32, 32, 4), 32), "cuda": ((256, 1024, 1024, 16), 256)}
"""The widths of a member, and the batch."""


PANELS = ("forward", "training step", "step as one graph")
"""What is compiled: the call; the call, with autograd and the update outside; all of the step."""


def main(quick: bool = False, peers: bool = False) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    rows = []
    limits = ceilings.measure(quick=quick)
    widths, batch = SIZES["cpu" if quick else DEVICE.type]
    for count in (4,) if quick else MEMBERS[DEVICE.type]:
        models = [mlp(*widths) for _ in range(count)]
        x = random(batch, widths[0])
        for panel in PANELS if quick or DEVICE.type == "cpu" else PANELS[1:]:
            torch.compiler.reset()
            if panel == "step as one graph":
                contenders = _in_one_graph(models, x, quick)
            else:
                contenders = _called(models, x, panel, quick)
            if peers and panel != "training step":  # what JAX compiles is all of the step
                contenders |= ask("JAX", "ensembles", models, x, train=panel != "forward")
            own = [list(model.parameters()) for model in models]
            # A step writes the parameters, too.
            work = limits.work(contenders["torch.func"], x, own, own if panel != "forward" else ())
            rows += bench.measure(contenders, panel=panel, n=count, quick=quick, work=work)
    return bench.record(__doc__, "members", rows, ceilings=limits)


def _called(models: list[Any], x: Tensor, panel: str, quick: bool) -> Contenders:
    calls = _calls(models)
    step = _forward if panel == "forward" else _step
    contenders = {name: partial(step, *call, x) for name, call in calls.items()}
    for name in ("torch.func", "fcall", "fcall.Ensemble", "by hand"):
        call, params = calls[name]
        compiled = torch.compile(call, backend=backend(quick), fullgraph=True)
        contenders[f"{name}, compiled"] = partial(step, compiled, params, x)
    ensemble = fcall.Ensemble(models)
    # Not the ensemble's own: where a module asks for its parameters, these take the slow route.
    own = ensemble.named_parameters()
    params = {name: p.detach().clone().requires_grad_() for name, p in own}
    compiled = fcall.compile(ensemble, backend=backend(quick))
    return contenders | {"fcall.compile": partial(step, compiled, params, x)}


def _in_one_graph(models: list[Any], x: Tensor, quick: bool) -> Contenders:
    contenders: Contenders = {}
    steps = _steps(models)
    for name, step in steps.items():
        params = {key: p.detach() for key, p in torch.func.stack_module_state(models)[0].items()}
        compiled = torch.compile(step, backend=backend(quick), fullgraph=True)
        contenders |= {name: partial(step, params, x)}
        contenders |= {f"{name}, compiled": partial(compiled, params, x)}
    params = {key: p.detach() for key, p in torch.func.stack_module_state(models)[0].items()}
    compiled = lean(fcall.Ensemble(models).members, steps["fcall"], params, quick)
    return contenders | {"fcall.compile": partial(compiled, x)}


Contenders = dict[str, Callable[[], Any]]
Call = Callable[[dict[str, Tensor], Tensor], Tensor]


def _calls(models: list[Any]) -> dict[str, tuple[Call, dict[str, Tensor]]]:
    """Return for each contender a function of parameters and inputs, and the parameters."""
    stacked = torch.func.stack_module_state(models)[0]
    base = fcall.meta_copy(models[0])
    own = {
        f"{i}.{name}": p for i, model in enumerate(models) for name, p in model.named_parameters()
    }
    ensemble = fcall.Ensemble(models)

    def under_vmap(call: Callable[..., Any]) -> Call:
        one = torch.func.vmap(lambda params, x: call(base, params, (x,)), in_dims=(0, None))
        return lambda params, x: one(params, x)

    return {
        "torch.func": (under_vmap(CALLS["torch.func"]), stacked),
        "fcall": (under_vmap(CALLS["fcall"]), stacked),
        "fcall.Ensemble": (lambda _, x: ensemble(x), dict(ensemble.named_parameters())),
        "by hand": (_by_hand, stacked),
        "a loop": (lambda _, x: torch.stack([model(x) for model in models]), own),
    }


def _by_hand(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Do what the members do as someone does who knows that they are an MLP."""
    layers = sorted({name.partition(".")[0] for name in params}, key=int)
    out = x.expand(len(params["0.weight"]), *x.shape)
    for layer in layers:
        weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
        out = torch.baddbmm(bias[:, None], out if layer == "0" else out.tanh(), weight.mT)
    return out


def _steps(models: list[Any]) -> dict[str, Call]:
    """Return for each contender all of a step; each member has a loss of its own."""
    base = fcall.meta_copy(models[0])

    def each(call: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return call(base, params, (x,)).square().mean()  # type: ignore[no-any-return]

        return torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None))

    def all_at_once(params: dict[str, Tensor], x: Tensor) -> Any:
        def losses(params: dict[str, Tensor]) -> Tensor:
            return _by_hand(params, x).square().mean((1, 2)).sum()

        return torch.func.grad_and_value(losses)(params)

    def step(gradients: Callable[..., Any], params: dict[str, Tensor], x: Tensor) -> Tensor:
        grads, losses = gradients(params, x)
        for name, grad in grads.items():
            params[name].sub_(grad, alpha=1e-12)
        return torch.stack([losses.sum(), sum(grad.square().sum() for grad in grads.values())])

    gradients = {name: each(call) for name, call in CALLS.items()} | {"by hand": all_at_once}
    return {name: partial(step, of_all) for name, of_all in gradients.items()}


def _forward(call: Call, params: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(params, x)


def _step(call: Call, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Do a step of gradient descent too small to tell, and return the loss before it."""
    loss = call(params, x).square().mean((1, 2)).sum()
    grads = torch.autograd.grad(loss, list(params.values()))
    with torch.no_grad():
        torch._foreach_add_(list(params.values()), grads, alpha=-1e-12)
    return torch.stack([loss, torch.stack([grad.square().sum() for grad in grads]).sum()])


if __name__ == "__main__":
    bench.run("ensembles", main)
