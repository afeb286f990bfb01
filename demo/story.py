"""The demo itself: call, compile, swap, export, and compare each with the plain module."""

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import fcall
from demo import compiles, times
from demo.encoder import Loaded, state
from demo.figures import Export, Figures, WeightSet
from demo.progress import Progress
from demo.sentences import nearest
from demo.weights import weight_sets, with_weights

OTHER_BATCH = 5
"""A batch size the exported program has not seen; the graph allows any from 2 on."""


def tell(loaded: Loaded, seed: int, progress: Progress) -> Figures:
    """Run every comparison on `loaded` and return what was measured."""
    model, inputs = loaded.encoder, loaded.inputs
    fewer = {name: tensor[:OTHER_BATCH] for name, tensor in inputs.items()}

    with progress.step("three weight sets, each in a deep copy of the module to compare with"):
        sets = weight_sets(model, seed)
        oracles = {name: with_weights(model, weights) for name, weights in sets.items()}
        expected = {name: oracle(**inputs) for name, oracle in oracles.items()}
        expected_fewer = {name: oracle(**fewer) for name, oracle in oracles.items()}
    pretrained, *_, changed = sets  # the names of the first and the last set
    weights, copy = sets[changed], oracles[changed]

    before = compiles.so_far()
    compiled_model = fcall.compile(model)
    with progress.step("fcall.compile: the first call compiles"):
        start = time.perf_counter()
        compiled_model(sets[pretrained], **inputs)
        first_call_seconds = time.perf_counter() - start
    with progress.step("the same graph with each weight set"):
        compiled = {name: compiled_model(weights, **inputs) for name, weights in sets.items()}

    routes = {
        "a deep copy of the module": lambda: copy(**inputs),
        "torch.func.functional_call": lambda: torch.func.functional_call(
            model, weights, (), inputs
        ),
        "fcall.functional_call": lambda: fcall.functional_call(model, weights, (), inputs),
        "fcall.compile": lambda: compiled_model(weights, **inputs),
    }
    answers = {name: call() for name, call in routes.items()}
    with progress.step("timing each route", still=True):
        milliseconds = times.interleaved(routes)
    compiled_so_far = compiles.so_far() - before

    with progress.step("fcall.export, save, load"):
        export, program = _export(loaded, sets[pretrained])
    with progress.step("the loaded program with each weight set, at two batch sizes"):
        exported = {name: program(weights, **inputs) for name, weights in sets.items()}
        exported_fewer = {name: program(weights, **fewer) for name, weights in sets.items()}

    neighbours, cosines = nearest(expected[pretrained])
    return Figures(
        model=loaded.name,
        parameters=len(list(model.parameters())),
        buffers=len(list(model.buffers())),
        numbers=sum(parameter.numel() for parameter in model.parameters()),
        uninitialised=loaded.uninitialised,
        route_weights=changed,
        routes={
            name: largest_difference(answer, expected[changed]) for name, answer in answers.items()
        },
        milliseconds=milliseconds,
        weight_sets={
            name: WeightSet(
                moved=largest_difference(expected[name], expected[pretrained]),
                nearest_kept=sum(
                    a == b for a, b in zip(nearest(expected[name])[0], neighbours, strict=True)
                ),
                compiled=largest_difference(compiled[name], expected[name]),
                exported=largest_difference(exported[name], expected[name]),
                exported_other_batch=largest_difference(exported_fewer[name], expected_fewer[name]),
            )
            for name in sets
        },
        compiles=compiled_so_far,
        module_changed=_differing(state(model), state(oracles[pretrained])),
        first_call_seconds=first_call_seconds,
        export=export,
        nearest=neighbours,
        cosines=cosines,
    )


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite when the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return (got - expected).abs().max().item()


def _differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]


def _export(loaded: Loaded, weights: dict[str, Tensor]) -> tuple[Export, torch.nn.Module]:
    """Export the encoder with a free batch size, and bring it back from a file."""
    batch = torch.export.Dim("batch")
    program = fcall.export(
        loaded.encoder,
        weights,
        kwargs=loaded.inputs,
        dynamic_shapes={name: {0: batch} for name in loaded.inputs},
    )
    program.example_inputs = None  # which hold the weights: the file would, too
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoder.pt2")
        torch.export.save(program, file)
        megabytes = file.stat().st_size / 1e6
        program = torch.export.load(file)
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    size = next(iter(loaded.inputs.values())).shape[0]
    export = Export(
        placeholders, len(program.graph_signature.user_inputs), megabytes, size, OTHER_BATCH
    )
    return export, program.module()
