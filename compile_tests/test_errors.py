"""Each error: the builtin it is, every clause of its message, its details, and that it pickles."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, NamedTuple

import pytest

from fcall import errors
from fcall.errors import base


class Case(NamedTuple):
    error: str
    builtin: type[Exception]
    details: tuple[Any, ...]
    clauses: list[str]
    """What the message says, in this order, and nothing else."""


CASES = [
    Case(
        "InvalidDictsError",
        ValueError,
        ("int",),
        [
            "parameter_and_buffer_dicts must be a dict from names to tensors, ",
            "or a list or tuple of such dicts, ",
            "but got int. ",
            "Pass for example dict(module.named_parameters()).",
        ],
    ),
    Case(
        "DuplicateNameError",
        ValueError,
        ("l1.bias",),
        ["the key 'l1.bias' appeared in multiple dictionaries. ", "Keep it in one of them."],
    ),
    Case(
        "InvalidNameError",
        KeyError,
        ("l1..bias",),
        [
            "'l1..bias' is not the name of a parameter or buffer: ",
            "names are non-empty strings as in module.named_parameters(), ",
            "with parts joined by single dots.",
        ],
    ),
    Case(
        "NotATensorError",
        TypeError,
        ("l1.bias", "float"),
        [
            "the value given for 'l1.bias' is not a tensor but a float. ",
            "Values must be torch.Tensor or implement __torch_function__; ",
            "leave a name out to keep the module's own tensor.",
        ],
    ),
    Case(
        "NotATensorSlotError",
        TypeError,
        ("rate", "Net", "float"),
        [
            "the attribute 'rate' of Net is not a tensor but a float. ",
            "Only tensors can be substituted; ",
            "pass other values as arguments.",
        ],
    ),
    Case(
        "UnknownPathError",
        AttributeError,
        ("Net", "l3.bias", ["l1.bias", "l2.weight"]),
        [
            "Net has no submodule to which the key 'l3.bias' leads",
            " (did you mean 'l1.bias'?).",
        ],
    ),
    Case(
        "PathThroughValueError",
        TypeError,
        ("Net", "l1.weight.x", "weight", "Parameter"),
        [
            "the key 'l1.weight.x' leads through 'weight', ",
            "which in Net is no submodule but a Parameter. ",
            "Names are those of module.named_parameters() and named_buffers().",
        ],
    ),
    Case(
        "ReadOnlyAttributeError",
        AttributeError,
        ("l1.total", "Linear"),
        [
            "can't set 'l1.total': ",
            "it is a property of Linear without a setter, and no tensor of its own.",
        ],
    ),
    Case(
        "LazyModuleError",
        RuntimeError,
        ("Net", ["l1.bias", "l1.weight"]),
        [
            "Net has lazy modules whose parameters are not made yet: ['l1.bias', 'l1.weight']. ",
            "Called with values for them, ",
            "they would turn into plain modules without parameters. ",
            "Call the module once as it is, with an input of the right shape, ",
            "and then functionally.",
        ],
    ),
    Case(
        "UnknownMethodError",
        AttributeError,
        ("Net", "encod", ["forward", "encode"]),
        ["Net has no method 'encod' to call", " (did you mean 'encode'?)."],
    ),
    Case(
        "TiedValuesError",
        ValueError,
        (["a", "b"], "Net"),
        [
            "functional_call got multiple values for keys ['a', 'b'], which are tied in Net. ",
            "Give one of them, or the same tensor for each, ",
            "or consider using tie_weights=False.",
        ],
    ),
    Case(
        "SharedSlotError",
        ValueError,
        (["a.w", "b.w"], "Net"),
        [
            "functional_call got multiple values for keys ['a.w', 'b.w'], ",
            "but in Net they are paths to one and the same submodule, ",
            "so tie_weights=False cannot untie them. ",
            "Give one of them, or the same tensor for each.",
        ],
    ),
    Case(
        "StrictKeysError",
        RuntimeError,
        ("Net", ["l2.bias", "l1.bias"], ["zzz", "l2.wieght"], ["l1.bias", "l2.weight"]),
        [
            "Error(s) in reparametrizing for Net:",
            "\n\tUnexpected key(s): 'l2.wieght' (did you mean 'l2.weight'?), 'zzz'.",
            "\n\tMissing key(s): 'l1.bias', 'l2.bias'.",
        ],
    ),
    Case(
        "PackedSequenceError",
        RuntimeError,
        (),
        [
            "an RNN was given a packed sequence under vmap, in forward mode, or in a compiled ",
            "function that needs gradients. ",
            "torch.lstm and its kin have no rules for these, so that fcall computes padded ",
            "sequences step by step in their stead. ",
            "Give the RNN a padded sequence, and mask what it returns beyond each length.",
        ],
    ),
    Case(
        "MetaTensorError",
        RuntimeError,
        ("Net", "given no value", ["l1.bias", "l2.bias"]),
        [
            "Net has tensors on the meta device that were given no value, ",
            "while the call has real tensors: ['l1.bias', 'l2.bias']. ",
            "A meta tensor holds no numbers; ",
            "give a real value for each of these names.",
        ],
    ),
    Case(
        "NotAModuleError",
        TypeError,
        ("function",),
        ["functional_call calls an nn.Module, but got a function."],
    ),
    Case(
        "UnsupportedModuleError",
        RuntimeError,
        ("the Jitted module Net", "Call another one."),
        ["functional_call can't be used with the Jitted module Net. ", "Call another one."],
    ),
    Case(
        "ReadOnlyMappingError",
        TypeError,
        ("count", "mappingproxy"),
        [
            "the module changes 'count', ",
            "but the mapping it came in (mappingproxy) is read-only, ",
            "so the new value cannot be written back. ",
            "Pass a dict: dict(mapping), or dict(fcall.open_state(path)).",
        ],
    ),
    Case(
        "MissingValuesError",
        RuntimeError,
        ("Net", "'l1.bias', 'l2.bias'"),
        [
            "export needs a value for every parameter and buffer of Net, ",
            "so that the graph's caller gives all of them. ",
            "Missing: 'l1.bias', 'l2.bias'. ",
            "For example pass {**dict(module.named_parameters()), ",
            "**dict(module.named_buffers()), **params}.",
        ],
    ),
    Case(
        "StateChangedError",
        RuntimeError,
        ("count", "(3,)", "(4,)"),
        [
            "the module reassigns 'count', from (3,) to (4,). ",
            "An exported graph writes new state into the tensors it was given, ",
            "so shape and dtype have to stay the same.",
        ],
    ),
    Case(
        "MissingExtraError",
        ImportError,
        ("fcall.open_state", "safetensors", "state"),
        [
            "fcall.open_state needs the package 'safetensors', which is not installed: ",
            "pip install 'fcall[state]'.",
        ],
    ),
    Case(
        "StateFileError",
        ValueError,
        ("w.safetensors", "header too small"),
        [
            "w.safetensors cannot be read as weights: header too small. ",
            "open_state takes a .safetensors file, ",
            "the .safetensors.index.json of a sharded one, ",
            "or a folder with either.",
        ],
    ),
    Case(
        "UnknownPrefixError",
        ValueError,
        ("w.safetensors", "modul.", ["model.", "module."]),
        [
            "w.safetensors has no names with the prefix 'modul.' (did you mean 'module.'?). ",
            "It has names with: ['model.', 'module.']. ",
            "A prefix ends with a dot.",
        ],
    ),
    Case(
        "StateDtypeError",
        TypeError,
        ("torch.int8",),
        [
            "open_state(dtype=...) converts floating tensors to another floating dtype, ",
            "such as torch.bfloat16, but got torch.int8.",
        ],
    ),
    Case(
        "ModelHasBuffersError",
        RuntimeError,
        ("Normed", ["norm.running_mean"]),
        [
            "make_functional is for models without buffers, ",
            "but Normed has ['norm.running_mean']. ",
            "Use make_functional_with_buffers, ",
            "or better fcall.functional_call.",
        ],
    ),
    Case(
        "ValuesCountError",
        ValueError,
        ("params", 4, 3),
        [
            "the function takes 4 params, but got 3. ",
            "Pass the params that were returned with it, ",
            "or as many others, in the same order.",
        ],
    ),
    Case(
        "PatchNotStartedError",
        RuntimeError,
        (),
        [
            "this patch_torch() is not started, so there is nothing to stop. ",
            "Keep the object that you started: ",
            "patch = fcall.patch_torch(); patch.start(); ...; patch.stop().",
        ],
    ),
    Case(
        "InPlaceUnderTransformError",
        RuntimeError,
        ("Net", ["a.mean", "a.var"], "add_ would mutate a captured Tensor."),
        [
            "Net writes in place under a transform, which refuses to write ",
            "into a tensor captured from around it. ",
            "Its buffers are ['a.mean', 'a.var']. ",
            "Pass the buffers as an argument of the transformed function, ",
            "as in grad(f)(params, buffers, x); ",
            "or copy them in it and return the copies as aux. ",
            "torch says: add_ would mutate a captured Tensor.",
        ],
    ),
    Case(
        "TangentsError",
        RuntimeError,
        ("shape at position 0", "(3,)", "(2, 3)"),
        [
            "the tangents given to the function that linearize returned are not like the primals: ",
            "the shape at position 0 is (3,), but (2, 3) was expected.",
        ],
    ),
    Case(
        "FunctionalizeOptionError",
        RuntimeError,
        ("views",),
        [
            "functionalize removes 'mutations' or 'mutations_and_views', ",
            "but got the invalid argument remove='views'.",
        ],
    ),
    Case(
        "NoModelsError",
        RuntimeError,
        (),
        ["stack_module_state: Expected at least one model, got 0."],
    ),
    Case(
        "UnlikeModelsError",
        RuntimeError,
        (2, "the shape of 'l1.bias'", "(3,)", "(4,)"),
        [
            "models[2] can't be stacked with models[0]: ",
            "the shape of 'l1.bias' is (3,), but (4,) in models[0]. ",
            "Stack models that differ in nothing but the values of their parameters and buffers.",
        ],
    ),
    Case(
        "MissingWeightsError",
        KeyError,
        ("MLP", ["l1.bias", "l2.bias"]),
        [
            "the graph of MLP takes values for ['l1.bias', 'l2.bias'], which were not given. ",
            "Pass them by name, ",
            "as in {**dict(module.named_parameters()), **dict(module.named_buffers())}.",
        ],
    ),
    Case(
        "UnexpectedWeightsError",
        KeyError,
        ("MLP", ["zz", "l1.wieght"], ["l1.weight", "l1.bias"]),
        [
            "the graph of MLP has no inputs named 'l1.wieght' (did you mean 'l1.weight'?), 'zz'. ",
            "It has: ['l1.bias', 'l1.weight'].",
        ],
    ),
    Case(
        "ProgramInputsError",
        ValueError,
        ("MLP", ["x: expected 1", "y: expected 2"]),
        [
            "the graph of MLP is for other inputs than it was given:",
            "\n\tx: expected 1",
            "\n\ty: expected 2",
        ],
    ),
    Case(
        "ProgramStructureError",
        ValueError,
        ("MLP", "*, k=*", "*"),
        [
            "the graph of MLP is called as it was traced: ",
            "positional arguments by position, keyword arguments by name, nested in the same way. ",
            "Expected (params, *, k=*), given (params, *).",
        ],
    ),
    Case(
        "BakedStateError",
        RuntimeError,
        ("Normed", ["mean"]),
        [
            "Normed changes ['mean'], which bake_rest=True makes constants of the graph. ",
            "Give values for these names, or leave bake_rest out, so that they are inputs.",
        ],
    ),
    Case(
        "GraphChangedError",
        ValueError,
        ("it has 2 outputs, expected 1",),
        [
            "this graph does not fit the Program: it has 2 outputs, expected 1. ",
            "A pass may change what is computed, ",
            "but has to leave placeholders and outputs as they are, in their order.",
        ],
    ),
    Case(
        "LossError",
        ValueError,
        ("MLP", "a float"),
        [
            "the gradients of MLP need a loss that is one real number, but it is a float. ",
            "Pass loss=a function of the output that returns a tensor with one element.",
        ],
    ),
    Case(
        "ExportedGradientError",
        RuntimeError,
        ("MLP",),
        [
            "MLP is called in grad, vjp, jacrev or hessian while torch.export records, ",
            "which takes the values of the examples for constants there, ",
            "and would make a graph that is wrong for all others. ",
            "Trace first, and export the traced graph: ",
            "fcall.trace(module, params, args).joint(loss).exported(); or for any function f ",
            "torch.export.export(make_fx(f)(*args), args), ",
            "make_fx from torch.fx.experimental.proxy_tensor.",
        ],
    ),
    Case(
        "PackageNameError",
        ValueError,
        ("a.so",),
        ["a package is a file whose name ends in .pt2, but got 'a.so'."],
    ),
    Case(
        "NotAPackageError",
        ValueError,
        ("a.pt2", "it is no zip file"),
        [
            "a.pt2 is not a package that fcall.package wrote: it is no zip file. ",
            "Other packages of AOTInductor are loaded by torch._inductor.aoti_load_package.",
        ],
    ),
    Case(
        "PackageDamagedError",
        ValueError,
        ("a.pt2", "the file is cut off"),
        [
            "a.pt2 is damaged: the file is cut off. ",
            "Copy it again, or make it anew with fcall.package.",
        ],
    ),
    Case(
        "PackageMismatchError",
        RuntimeError,
        ("a.pt2", ["torch: made for 1, here 2", "cpu: none"]),
        [
            "a.pt2 cannot run here. Make it anew with fcall.package.",
            "\n\ttorch: made for 1, here 2",
            "\n\tcpu: none",
        ],
    ),
    Case(
        "NotPackagedError",
        RuntimeError,
        ("gradients",),
        [
            "a package is compiled code, with no rules for gradients. ",
            "Call the Program it was made of, or, where only the values matter, ",
            "pass plain tensors, under torch.no_grad().",
        ],
    ),
    Case(
        "KernelsUnavailableError",
        RuntimeError,
        ("Triton is not installed",),
        [
            "no CUDA code can be generated here: ",
            "Triton is not installed. ",
            "Install the Triton that was made for this torch; ",
            "for torch 2.13: pip install triton==3.7.1, on Linux.",
        ],
    ),
    Case(
        "NotOnCudaError",
        ValueError,
        (["a constant of shape (2,)", "aten.f_for_cpu.default"],),
        [
            "CUDA code is generated from a graph that was traced on the CPU, ",
            "and in this one are things that would be otherwise on CUDA: ",
            "a constant of shape (2,), aten.f_for_cpu.default. ",
            "Instead of scaled_dot_product_attention write matmuls and a softmax; ",
            "pass tensors that are made of numbers as arguments.",
        ],
    ),
    Case(
        "StaticSetsError",
        ValueError,
        (-1, "with mode=None"),
        [
            "static_sets is how many sets of weights have a CUDA graph of their own: ",
            "a number from 0, where CUDA graphs are recorded, ",
            "as with backend='inductor' and mode='reduce-overhead'. ",
            "It is -1, with mode=None. Leave it out, or ask for CUDA graphs.",
        ],
    ),
    Case(
        "UncachedBackendError",
        ValueError,
        ("eager",),
        [
            "fcall.compile keeps on disk what backend='inductor' compiles, ",
            "without the options 'guard_filter_fn', 'size_asserts' and 'use_aoti'; ",
            "it was given backend='eager'. Leave out cache, or these.",
        ],
    ),
]

each = pytest.mark.parametrize("case", CASES, ids=[case.error for case in CASES])


def test_every_error_is_here() -> None:
    classes = set(errors.__all__) - {"FcallError", "FcallWarning"}
    assert classes == {case.error for case in CASES}
    defined = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    assert {c.__name__ for c in defined if c.__module__.startswith(errors.__name__)} == set(
        errors.__all__
    )


@each
def test_message_and_details(case: Case) -> None:
    error = getattr(errors, case.error)(*case.details)
    assert str(error) == "".join(case.clauses)
    assert error.args == (str(error),)
    assert error.details == case.details


@each
def test_it_is_the_builtin_that_torch_raises(case: Case) -> None:
    cls = getattr(errors, case.error)
    assert issubclass(cls, errors.FcallError)
    assert issubclass(cls, case.builtin)
    builtins = {c for c in cls.__mro__ if c.__module__ == "builtins"}
    assert builtins == set(case.builtin.__mro__)  # and no other builtin catches it
    with pytest.raises(case.builtin):
        errors.fail(cls, *case.details)


@each
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
@pytest.mark.parametrize("traced", [False, True])
def test_copies(case: Case, again: Any, traced: bool) -> None:
    cls = getattr(errors, case.error)
    error = (base._unwrapped(cls) if traced else cls)(*case.details)
    twin = again(error)
    assert type(twin) is cls
    assert str(twin) == str(error)
    assert twin.details == case.details


@each
def test_what_leaves_a_trace_is_named_alike(case: Case) -> None:
    """Dynamo leaves an AssertionError as it is: those raised in a trace are ones, too."""
    cls = getattr(errors, case.error)
    traced = base._unwrapped(cls)
    assert issubclass(traced, cls)
    assert issubclass(traced, AssertionError)
    assert (traced.__name__, traced.__module__) == (cls.__name__, cls.__module__)


@each
def test_docstrings_say_what_the_details_are(case: Case) -> None:
    assert "Details: " in inspect.getdoc(getattr(errors, case.error))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1.wieght", " (did you mean 'l1.weight'?)"),
        ("l1.weight2", " (did you mean 'l1.weight'?)"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest(name: str, expected: str) -> None:
    assert errors.nearest(name, ["l2.bias", "l1.weight"]) == expected
    assert errors.nearest(name, []) == ""
