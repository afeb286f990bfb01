"""``fcall.compile(cache=...)``: what is compiled is kept on disk, and used where it is right."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcall
from compile_tests.support.compiled import backward, gradients
from compile_tests.support.models import EXAMPLES, MLP, Counter
from compile_tests.support.oracle import assert_close, in_float64, loaded, state_of, unchanged

pytestmark = [pytest.mark.compiled, pytest.mark.inductor]

call = fcall.functional_call


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


GLOBAL = {"factor": 1.0}


def helper(x: Tensor) -> Tensor:
    return x.tanh()


def other_helper(x: Tensor) -> Tensor:
    return x.sigmoid()


class Reads(nn.Module):
    """Reads all kinds of things while it is traced."""

    offset = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(3, 4)
        self.power = 2.0
        self.plain = torch.ones(4)
        self.activation = nn.functional.relu

    def forward(self, x: Tensor) -> Tensor:
        y = helper(self.l1(x)) * self.power + self.offset
        y = self.activation(y) * self.plain * GLOBAL["factor"]
        return y * 2 if self.training else y


class WithHead(Reads):
    pass


def graphs() -> int:
    """How many graphs Dynamo has traced."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def first_call(module: nn.Module, folder: Path, *args: Any) -> tuple[Any, bool, list[str]]:
    """Make a compiled call and call it; return the result, whether it was compiled, warnings."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = fcall.compile(module, cache=folder)(*args)
    said = [str(w.message) for w in caught if w.category is fcall.errors.FcallWarning]
    return out, graphs() > 0, said


@pytest.mark.parametrize("name", ["MLP", "Normed"])
@pytest.mark.parametrize("grad", [False, True])
def test_results_and_gradients(name: str, grad: bool, tmp_path: Path) -> None:
    module, x = EXAMPLES[name]()
    buffers = dict(module.named_buffers())

    def given(seed: int) -> dict[str, Tensor]:
        p = state_of(module, seed=seed)
        for key, value in p.items():
            value.requires_grad_(grad and key not in buffers)
        return p

    _, compiled, said = first_call(module, tmp_path, given(0), x)
    assert compiled
    assert not said
    torch._dynamo.utils.counters.clear()
    fn = fcall.compile(module, cache=tmp_path)
    for seed in (1, 2, 3):
        p, same = given(seed), given(seed)
        with unchanged(module), fcall.record_routes() as routes:
            out = fn(p, x)
        expected = call(module, same, x)
        assert_close(out, expected)
        if grad:
            backward(out)
            backward(expected)
            assert_close(gradients(p), gradients(same))
        assert_close(p, same)
    assert graphs() == 0
    assert [route.kind for route in routes] == ["fast"]


def test_state_is_written_back(tmp_path: Path) -> None:
    first_call(Counter(), tmp_path, {"foo": torch.zeros(())}, torch.zeros(2))
    p = {"foo": torch.tensor(3.0)}
    out, compiled, _ = first_call(Counter(), tmp_path, p, torch.zeros(2))
    assert (p["foo"], out[0], compiled) == (4, 4, False)


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "number": lambda m, patch: patch.setattr(m, "power", 3.0),
    "eval": lambda m, patch: m.eval(),
    "global": lambda m, patch: patch.setitem(GLOBAL, "factor", 7.0),
    "function": lambda m, patch: patch.setitem(globals(), "helper", other_helper),
    "code of a function": lambda m, patch: patch.setattr(helper, "__code__", other_helper.__code__),
    "function of the module": lambda m, patch: patch.setattr(m, "activation", other_helper),
    "function of torch": lambda m, patch: patch.setattr(
        nn.Linear, "forward", lambda self, x: x @ self.weight.mT * 3
    ),
    "attribute of the class": lambda m, patch: patch.setattr(Reads, "offset", 5.0),
    "method of the class": lambda m, patch: patch.setattr(
        Reads, "forward", lambda self, x: self.l1(x) * 10
    ),
    "forward of the instance": lambda m, patch: setattr(m, "forward", lambda x: m.l1(x) * 3),
    "class": lambda m, patch: setattr(m, "__class__", WithHead),
    "submodule": lambda m, patch: setattr(m, "l1", nn.Sequential(m.l1)),
    "class of a submodule": lambda m, patch: setattr(m, "l1", Doubled(3, 4)),
    "plain tensor": lambda m, patch: setattr(m, "plain", torch.full((1,), 3.0)),
    "hook": lambda m, patch: m.register_forward_hook(lambda m, args, out: out * 100),
}

OF_CLASSES = ("function of torch", "method of the class")
"""Changes of what a class calls, which Dynamo does not see after it has traced the class."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compiled call of Reads."""
    folder = tmp_path_factory.mktemp("kept")
    module = Reads()
    _, compiled, said = first_call(module, folder, state_of(module), torch.rand(3, 3))
    assert compiled
    assert not said
    assert not first_call(module, folder, state_of(module), torch.rand(3, 3))[1]
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_changes(
    change: str, when: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "after it" and change in OF_CLASSES:
        pytest.skip("torch.compile does not see it either")
    for file in kept.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    module, x = Reads(), torch.rand(3, 3)
    torch._dynamo.utils.counters.clear()
    fn = fcall.compile(module, cache=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fcall.errors.FcallWarning)
        if when == "after it":
            fn(state_of(module, seed=2), x)
            assert graphs() == 0
        CHANGES[change](module, monkeypatch)
        p = state_of(module, seed=1)
        for _ in range(2):
            assert_close(fn(p, x), call(module, p, x))
    assert change == "code of a function" or graphs() == 1


def test_the_code_of_a_file_that_was_changed(tmp_path: Path) -> None:
    """In processes of their own, with another process's files."""
    results = {}
    for run, body in enumerate(["x.tanh()", "x.tanh()", "x.sigmoid()"]):
        (tmp_path / "model.py").write_text(MODEL.format(body=body))
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", RUN, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results[run] = json.loads(done.stdout.splitlines()[-1])
        assert ("the code has changed of model" in done.stderr) == (run == 2)
    assert [results[run]["graphs"] for run in range(3)] == [1, 0, 1]
    assert all(result["right"] for result in results.values())


MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x):
        x = self.layer(x)
        return {body}
"""

RUN = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import fcall, model

m, x = model.Model(), torch.rand(2, 3)
p = {name: torch.rand_like(value) for name, value in m.named_parameters()}
f = fcall.compile(m, cache=sys.argv[1] + "/cache")
expected = fcall.functional_call(m, p, x)
right = all(torch.allclose(f(p, x), expected) for _ in range(2))
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps({"right": right, "graphs": graphs}))
"""


def of_another_version(data: bytes) -> bytes:
    """Return the same file as made by another torch, its digest right."""
    start = len(b"fcall compiled call 1\n") + 32
    body = data[start:].replace(torch.__version__.encode(), b"9" * len(torch.__version__), 1)
    return data[: start - 32] + hashlib.sha256(body).digest() + body


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no file of this version"),
    "truncated": (lambda data: data[:-100], "damaged"),
    "one bit": (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "damaged"),
    "foreign": (lambda data: b"PK\3\4" + data, "no file of this version"),
    "another torch": (of_another_version, "made with torch 9999"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_written_anew(
    damage: str, kept: Path, tmp_path: Path
) -> None:
    (file,) = kept.iterdir()
    change, reason = DAMAGES[damage]
    whole = file.read_bytes()
    (tmp_path / file.name).write_bytes(change(whole))
    module, x = Reads(), torch.rand(3, 3)
    p = state_of(module, seed=1)
    out, compiled, (said,) = first_call(module, tmp_path, p, x)
    assert_close(out, call(module, p, x))
    assert compiled
    for clause in (str(tmp_path / file.name), "not used, and written anew", reason):
        assert clause in said
    out, compiled, said = first_call(module, tmp_path, p, x)
    assert_close(out, call(module, p, x))
    assert (compiled, said) == (False, [])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # nothing else is left


def test_a_file_under_the_name_of_another(kept: Path, tmp_path: Path) -> None:
    module = Reads()
    p = state_of(module, seed=1)
    first_call(module, tmp_path, p, torch.rand(5, 3))
    (name,), (other,) = tmp_path.iterdir(), kept.iterdir()
    name.write_bytes(other.read_bytes())
    out, compiled, said = first_call(module, tmp_path, p, x := torch.rand(5, 3))
    assert_close(out, call(module, p, x))
    assert compiled
    assert len(said) == 1


OTHER_CALLS: dict[str, Callable[[dict[str, Tensor], Tensor], Any]] = {
    "size": lambda p, x: (p, torch.rand(4, 3)),
    "strides": lambda p, x: (p, x.t().contiguous().t()),
    "gradient": lambda p, x: ({n: v.requires_grad_() for n, v in p.items()}, x),
    "some names": lambda p, x: ({"l1.bias": p["l1.bias"]}, x),
    "dtype": lambda p, x: ({n: v.double() for n, v in p.items()}, x.double()),
}


@pytest.mark.parametrize("kind", OTHER_CALLS)
def test_calls_of_other_kinds_are_kept_apart(kind: str, kept: Path, tmp_path: Path) -> None:
    (file,) = kept.iterdir()
    (tmp_path / file.name).write_bytes(file.read_bytes())
    module = Reads()
    p, x = OTHER_CALLS[kind](state_of(module, seed=1), torch.rand(3, 3))
    for compiled in (True, False):
        out, was_compiled, said = first_call(module, tmp_path, p, x)
        assert_close(out, call(module, p, x))
        assert (was_compiled, said) == (compiled, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_no_grad_and_autocast_are_kept_apart(tmp_path: Path) -> None:
    module, x = MLP(), torch.rand(5, 3)
    p = {n: v.requires_grad_() for n, v in state_of(module, seed=1).items()}
    for around in (torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        for compiled in (True, False):
            with around():
                out, was_compiled, _ = first_call(module, tmp_path, p, x)
                expected = call(module, p, x)
            assert_close(out, expected)
            assert (out.dtype, out.requires_grad) == (expected.dtype, expected.requires_grad)
            assert was_compiled == compiled


@torch.compiler.assume_constant_result
def constant() -> float:
    return 3.0


class Breaks(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class UsesConstant(MLP):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(x) * constant()


def hooked() -> nn.Module:
    module = MLP()
    module.register_forward_hook(lambda m, args, out: out * 2)
    return module


@pytest.mark.parametrize(
    ("make", "settings", "reason"),
    [
        (Breaks, {}, "breaks the graph"),
        (UsesConstant, {}, "constant is constant while it is traced"),
        (hooked, {}, "hooks"),
        (MLP, {"dynamic": True}, "of any size"),
    ],
)
def test_what_is_not_kept(
    make: Callable[[], nn.Module], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    module, x = make(), torch.rand(5, 3)
    p = state_of(module, seed=1)
    fn = fcall.compile(module, cache=tmp_path, **settings)
    with pytest.warns(fcall.errors.FcallWarning, match=f"is not kept: .*{reason}"):
        out = fn(p, x)
    assert_close(out, call(module, p, x))
    assert not list(tmp_path.glob("*"))


@torch._inductor.config.patch(fx_graph_cache=False)
def test_nothing_is_kept_where_inductor_keeps_nothing(tmp_path: Path) -> None:
    test_what_is_not_kept(MLP, {}, "caches of Inductor", tmp_path)


def test_only_for_inductor(tmp_path: Path) -> None:
    with pytest.raises(fcall.errors.UncachedBackendError, match="backend='aot_eager'"):
        fcall.compile(MLP(), backend="aot_eager", cache=tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module, x = MLP(), torch.rand(5, 3)
    p = state_of(module, seed=1)
    out, _, (said,) = first_call(module, tmp_path / "file" / "cache", p, x)
    assert "is not kept" in said
    assert_close(out, loaded(module, p)(in_float64(x)))


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL.format(body="x.tanh()"))
    command = [sys.executable, "-W", "error::UserWarning:fcall", "-c", RUN, str(tmp_path)]
    root = Path(__file__).parents[1]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) for _ in range(2)]
    for process in running:
        out, _ = process.communicate(timeout=200)
        assert json.loads(out.splitlines()[-1])["right"]
    assert len(list((tmp_path / "cache").iterdir())) == 1
