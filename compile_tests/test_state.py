"""``fcall.open_state``: weights on disk as a mapping, read when they are asked for."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

import fcall
from compile_tests.support.models import MLP, Counter, Normed, Tied
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged
from fcall import errors

X = torch.rand(4, 3)


def saved(state: Mapping[str, Tensor], path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, path)
    return path


def sharded(state: Mapping[str, Tensor], folder: Path, index: str = "model") -> Path:
    """Write each tensor to a file of its own, and an index."""
    shards = {name: f"{index}-{i}-of-{len(state)}.safetensors" for i, name in enumerate(state)}
    for name, shard in shards.items():
        saved({name: state[name]}, folder / shard)
    path = folder / f"{index}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return path


@pytest.fixture
def values() -> dict[str, Tensor]:
    return state_of(MLP(), seed=1)


@pytest.fixture
def path(values: dict[str, Tensor], tmp_path: Path) -> Path:
    return saved(values, tmp_path / "w.safetensors")


class Counting:
    """In place of ``safetensors.safe_open``: notes what is opened and read."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.read: list[str] = []
        self._open = safetensors.safe_open

    def __call__(self, path: Any, **options: Any) -> Any:
        self.opened.append(Path(path).name)
        handle = self._open(path, **options)

        def get_tensor(name: str) -> Tensor:
            self.read.append(name)
            return handle.get_tensor(name)

        return mock.Mock(keys=handle.keys, get_tensor=get_tensor)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(safetensors, "safe_open", counting)
    return counting


# --- the mapping --------------------------------------------------------------------------------


def test_a_file(path: Path, values: dict[str, Tensor]) -> None:
    for given in (path, str(path)):
        state = fcall.open_state(given)
        assert set(state) == set(values)
        assert len(state) == len(values)
        assert_close(dict(sorted(state.items())), dict(sorted(values.items())))
        assert "l1.bias" in state
        assert "l1" not in state
        assert 5 not in state
        with pytest.raises(KeyError, match=r"^'l1'$"):
            state["l1"]
        assert state.get("l1") is None
        assert repr(state) == f"State({str(path)!r}: 4 tensors)"
        assert state["l1.bias"] is state["l1.bias"]  # as in a dict


def test_it_cannot_be_written_to(path: Path) -> None:
    state: Any = fcall.open_state(path)
    with pytest.raises(TypeError, match="item assignment"):
        state["l1.bias"] = torch.zeros(3)
    with pytest.raises(TypeError, match="item deletion"):
        del state["l1.bias"]


def test_only_what_is_asked_for_is_read(path: Path, counting: Counting) -> None:
    state = fcall.open_state(path)
    assert list(state) == sorted(state)
    assert "l1.bias" in state
    assert counting.read == []
    for _ in range(2):
        state["l2.bias"]
    assert counting.read == ["l2.bias"]
    assert counting.opened == ["w.safetensors"]


def test_shards(values: dict[str, Tensor], tmp_path: Path, counting: Counting) -> None:
    index = sharded(values, tmp_path)
    for given in (index, tmp_path):
        state = fcall.open_state(given)
        assert list(state) == list(values)
        assert counting.opened == []
        assert_close(state["l2.bias"], values["l2.bias"])
        assert counting.opened == [f"model-{list(values).index('l2.bias')}-of-4.safetensors"]
        assert_close(dict(state), values)
        assert len(counting.opened) == 4
        counting.opened.clear()


def test_folders(values: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(errors.StateFileError, match=r"no \.safetensors file"):
        fcall.open_state(tmp_path)
    saved(values, tmp_path / "a.safetensors")
    assert len(fcall.open_state(tmp_path)) == 4
    saved(values, tmp_path / "b.safetensors")
    with pytest.raises(errors.StateFileError, match=r"\['a.safetensors', 'b.safetensors'\]"):
        fcall.open_state(tmp_path)
    sharded({"x": X}, tmp_path)
    assert list(fcall.open_state(tmp_path)) == ["x"]


def test_dtypes(tmp_path: Path) -> None:
    given = {
        "double": torch.rand(3).double(),
        "half": torch.rand(3).half(),
        "index": torch.arange(3),
        "mask": torch.ones(2).bool(),
        "number": torch.tensor(1.5),
        "nothing": torch.empty(0, 3),
        "complex": torch.rand(2).to(torch.complex64),
    }
    path = saved(given, tmp_path / "w.safetensors")
    as_it_is, converted = fcall.open_state(path), fcall.open_state(path, dtype=torch.bfloat16)
    for name, value in given.items():
        floating = value.is_floating_point()
        assert torch.equal(as_it_is[name], value)
        assert as_it_is[name].dtype == value.dtype
        assert torch.equal(converted[name], value.bfloat16() if floating else value)
        assert converted[name].dtype == (torch.bfloat16 if floating else value.dtype)
        assert converted[name] is converted[name]
    for dtype in (torch.int8, torch.complex64, "float32"):
        with pytest.raises(errors.StateDtypeError, match=str(dtype)):
            fcall.open_state(path, dtype=dtype)  # type: ignore[arg-type]


def test_prefixes(values: dict[str, Tensor], tmp_path: Path, counting: Counting) -> None:
    path = saved(values, tmp_path / "w.safetensors", "_orig_mod.model.")
    names = list(fcall.open_state(path, prefix="_orig_mod."))
    assert names == ["model." + name for name in sorted(values)]
    state = fcall.open_state(path, prefix="_orig_mod.model.")
    assert_close(state["l1.bias"], values["l1.bias"])
    assert list(state) == sorted(values)
    part = fcall.open_state(path, prefix="_orig_mod.model.l1.")
    assert set(part) == {"weight", "bias"}  # the others are left out
    assert counting.read == ["_orig_mod.model.l1.bias"]


@pytest.mark.parametrize("prefix", ["modle.", "model", "l1", ".", "model.l3."])
def test_unknown_prefixes(values: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    path = saved(values, tmp_path / "w.safetensors", "model.")
    with pytest.raises(errors.UnknownPrefixError) as caught:
        fcall.open_state(path, prefix=prefix)
    assert caught.value.details == (str(path), prefix, ["model.", "model.l1.", "model.l2."])
    is_near = prefix in ("modle.", "model")
    assert ("did you mean 'model.'?" in str(caught.value)) == is_near
    bare = saved({"weight": X}, tmp_path / "bare.safetensors")
    with pytest.raises(errors.UnknownPrefixError, match="Its names have no prefixes"):
        fcall.open_state(bare, prefix=prefix)


def test_tensors_read_in_inference_mode_are_plain(path: Path) -> None:
    state = fcall.open_state(path, dtype=torch.float64)
    with torch.inference_mode():
        weight = state["l1.weight"]
    assert not weight.is_inference()
    twin = MLP().double()
    grads = torch.func.grad(lambda p: fcall.functional_call(twin, p, X.double()).sum())(dict(state))
    assert grads["l1.weight"].any()


def test_tensors_read_in_a_transform_are_not_of_it(path: Path, values: dict[str, Tensor]) -> None:
    state = fcall.open_state(path, dtype=torch.float64)
    torch.func.grad(lambda x: (x * state["l1.bias"]).sum())(values["l1.bias"].double())
    torch.func.vmap(lambda x: x * state["l2.bias"])(torch.rand(2, *values["l2.bias"].shape))
    for name in ("l1.bias", "l2.bias"):
        assert torch.equal(state[name], values[name].double())


def test_in_place_changes_stay_in_memory(path: Path, values: dict[str, Tensor]) -> None:
    for dtype in (None, torch.float64):
        state = fcall.open_state(path, dtype=dtype)
        state["l1.bias"].zero_()
        assert state["l1.bias"].sum() == 0
        assert_close(fcall.open_state(path)["l1.bias"], values["l1.bias"])


# --- as weights ---------------------------------------------------------------------------------


def test_calls(path: Path, values: dict[str, Tensor]) -> None:
    module = MLP()
    expected = loaded(module, values)(in_float64(X))
    state = fcall.open_state(path)
    with unchanged(module):
        assert_close(fcall.functional_call(module, state, X), expected, dtype=torch.float32)
        assert_close(fcall.functional_call(module, [state], X), expected, dtype=torch.float32)
        with fcall.substitute(module, state):
            assert_close(module(X), expected, dtype=torch.float32)


@pytest.mark.compiled
def test_compiled_calls(path: Path, values: dict[str, Tensor]) -> None:
    module = MLP()
    expected = loaded(module, values)(in_float64(X))
    run = fcall.compile(module, backend="aot_eager")
    for _ in range(2):
        assert_close(run(fcall.open_state(path), X), expected, dtype=torch.float32)


@pytest.mark.compiled
def test_programs(path: Path, values: dict[str, Tensor]) -> None:
    module = MLP()
    expected = loaded(module, values)(in_float64(X))
    program = fcall.trace(module, fcall.open_state(path), X)
    other = {"l1.bias": values["l1.bias"]}
    rest = saved(
        {name: value for name, value in values.items() if name not in other},
        path.parent / "rest.safetensors",
    )
    for given in (fcall.open_state(path), path, str(path), [str(rest), other], (other, rest)):
        assert_close(program(given, X), expected, dtype=torch.float32)


@pytest.mark.compiled
def test_tied_names(tmp_path: Path) -> None:
    module = Tied()
    values = state_of(module, seed=1)
    x = torch.randint(0, 5, (3,))
    expected = loaded(module, values)(x)
    path = saved(values, tmp_path / "w.safetensors")
    program = fcall.trace(module, values, x)
    assert_close(program(path, x), expected, dtype=torch.float32)
    assert_close(
        fcall.functional_call(module, fcall.open_state(path), x), expected, dtype=torch.float32
    )
    [spec] = [spec for spec in program.signature.inputs if spec.tied]
    both = {**values, spec.tied[0]: values[spec.name].clone()}
    state = fcall.open_state(saved(both, tmp_path / "both.safetensors"))
    with pytest.raises(errors.TiedValuesError):
        program(state, x)
    taken = {name: state[name] for name in program.names}
    assert_close(program(taken, x), expected, dtype=torch.float32)


@pytest.mark.compiled
def test_state_that_is_reassigned_cannot_be_written_back(tmp_path: Path) -> None:
    module, x = Counter(), torch.rand(2, 3)
    values = state_of(module)
    path = saved(values, tmp_path / "w.safetensors")
    program = fcall.trace(module, values, x)
    says = r"changes '\w+', but the mapping it came in \(State\) is read-only.*dict\(mapping\)"
    for call in (
        lambda: fcall.functional_call(module, fcall.open_state(path), x),
        lambda: program(fcall.open_state(path), x),
        lambda: program(path, x),
    ):
        with pytest.raises(errors.ReadOnlyMappingError, match=says):
            call()


@pytest.mark.compiled
def test_state_that_is_changed_in_place(tmp_path: Path) -> None:
    module, x = Normed().train(), torch.rand(4, 2, 6, 6)
    values = state_of(module)
    path = saved(values, tmp_path / "w.safetensors")
    program = fcall.trace(module, values, x)
    fcall.functional_call(module, values, x)
    for given in (dict(fcall.open_state(path)), fcall.open_state(path)):
        program(given, x)
        assert_close(dict(given), {name: values[name] for name in given})
    with pytest.raises(errors.ReadOnlyMappingError, match="norm"):
        program(path, x)


# --- names that do not fit ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> fcall.Program:
    module = MLP()
    return fcall.trace(module, state_of(module), X)


def with_prefix(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {prefix + name: value for name, value in values.items()}


@pytest.mark.compiled
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "a.b_c.", "l1.", "l2.l1."])
def test_prefixes_are_proposed(
    program: fcall.Program, path: Path, values: dict[str, Tensor], prefix: str
) -> None:
    given = with_prefix(prefix)(values)
    for more in ({}, {"head.weight": X, "other.l3.bias": X[:1].clone()}):
        with pytest.raises(errors.UnexpectedWeightsError) as caught:
            program({**more, **given}, X)
        advice = f"with the prefix {prefix!r} removed: open_state(path, prefix={prefix!r})."
        assert str(caught.value).endswith(f"; they would fit {advice}")
    fit = fcall.open_state(saved({**more, **given}, path), prefix=prefix)
    assert_close(program(fit, X), program(values, X))


@pytest.mark.compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda values: {**values, "ema.l1.bias": X},  # the others fit as they are
        lambda values: {**values, **with_prefix("ema.")(values)},
        lambda values: {name + "_g": value for name, value in values.items()},
        lambda values: {"l1.wieght" if n == "l1.weight" else n: v for n, v in values.items()},
        lambda values: {**{f"{i}.x": X for i in range(9)}, "a.l1.bias": X},
    ],
)
def test_prefixes_that_explain_too_little(
    program: fcall.Program, values: dict[str, Tensor], change: Any
) -> None:
    with pytest.raises(errors.UnexpectedWeightsError) as caught:
        program(change(values), X)
    assert "prefix" not in str(caught.value)
    assert "It has: ['l1.bias', 'l1.weight', 'l2.bias', 'l2.weight']" in str(caught.value)


@pytest.mark.compiled
def test_many_wrong_names_are_told_in_short(program: fcall.Program) -> None:
    given = {f"model.{i}.x": X for i in range(500)}
    given |= {"model." + name: X for name in program.names}
    with pytest.raises(errors.UnexpectedWeightsError, match="and 501 more; they would fit"):
        program(given, X)


@pytest.mark.compiled
def test_names_of_a_file_that_are_missing(
    program: fcall.Program, values: dict[str, Tensor], tmp_path: Path
) -> None:
    del values["l2.bias"]
    path = saved(values, tmp_path / "w.safetensors")
    with pytest.raises(errors.MissingWeightsError, match=r"\['l2.bias'\]"):
        program(path, X)


# --- what is wrong with files -------------------------------------------------------------------


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "empty": (b"", "header too small"),
    "another kind of file": (b"PK\3\4" + b"weights" * 9, "header"),
    "no JSON": (struct.pack("<Q", 4) + b"{a:}", "invalid JSON"),
    "cut off in the tensors": (header(x=F32) + b"1234", "not fully covered"),
    "cut off in the header": (header(x=F32)[:20], "invalid header length"),
    "more than it says": (header(x=F32) + b"12345678x", "not fully covered"),
    "an unknown dtype": (header(x={**F32, "dtype": "F99"}) + bytes(8), "F99"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    content, cause = BAD_FILES[kind]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(errors.StateFileError) as caught:
        dict(fcall.open_state(path))
    assert caught.value.details[0] == str(path)
    assert cause in caught.value.details[1]


def test_a_dtype_that_torch_has_not(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    six_bits = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    path.write_bytes(header(x=six_bits) + bytes(3))
    state = fcall.open_state(path)
    with pytest.raises(errors.StateFileError, match=r"w\.safetensors"):
        state["x"]


def test_files_that_are_not_there(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        fcall.open_state(tmp_path / "none.safetensors")


INDEX = '{"weight_map": %s}'
BAD_INDICES = {
    "no JSON": ("{", "JSONDecodeError"),
    "no text": (b"\xff\xfe\x00", "Error"),
    "a list": ("[]", "TypeError"),
    "no map": ('{"metadata": {}}', "'weight_map'"),
    "a list of names": (INDEX % '["x"]', "AttributeError"),
    "numbers": (INDEX % '{"x": 1}', "TypeError"),
    "nested": ("[" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize("kind", BAD_INDICES)
def test_bad_indices(tmp_path: Path, kind: str) -> None:
    content, cause = BAD_INDICES[kind]
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(errors.StateFileError, match="it is no index of shards") as caught:
        fcall.open_state(tmp_path)
    assert caught.value.details[0] == str(path)
    assert cause in caught.value.details[1]


def test_bad_shards(values: dict[str, Tensor], tmp_path: Path) -> None:
    index = sharded(values, tmp_path)
    shards = json.loads(index.read_text())["weight_map"]
    saved({"other": X}, tmp_path / shards["l1.bias"])
    (tmp_path / shards["l2.bias"]).write_bytes(b"cut")
    state = fcall.open_state(index)
    assert_close(state["l1.weight"], values["l1.weight"])  # the others are whole
    with pytest.raises(errors.StateFileError, match=f"{shards['l1.bias']}.*l1.bias"):
        state["l1.bias"]
    with pytest.raises(errors.StateFileError, match=shards["l2.bias"]):
        state["l2.bias"]
    for name in ("l1.bias", "l2.bias"):
        (tmp_path / shards[name]).unlink()
    with pytest.raises(errors.StateFileError, match="these shards are not there") as caught:
        fcall.open_state(index)
    assert all(shards[name] in str(caught.value) for name in ("l1.bias", "l2.bias"))
    state = fcall.open_state(sharded(values, tmp_path))
    (tmp_path / shards["l1.bias"]).unlink()
    with pytest.raises(errors.StateFileError, match="not there, or no file"):
        state["l1.bias"]


def test_without_the_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'fcall\[state\]'"):
        fcall.open_state(path)
