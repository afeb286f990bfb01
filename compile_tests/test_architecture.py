"""The rules of the house: who may import whom, and where torch's private modules are touched."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fcall

ROOT = Path(fcall.__file__).resolve().parent
FILES = {
    ".".join(("fcall", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
"""The path of each module of fcall, by its full name."""

FLOORS = [
    {"_torch", "identity", "prefixes", "routes", "version"},
    {"passes", "deprecation", "batch_norm", "errors"},
    {"scoped"},
    {"binding", "kernels", "meta", "refused", "rnn", "state"},
    {"mismatch"},
    {"substitution", "stacking", "placement"},
    {"plan", "at_once"},
    {"eager", "given", "operator"},
    {"call"},
    {"compiled", "program", "substitute", "stateless", "func", "ensemble"},
    {"functorch", "patch"},
    {"fcall"},  # the face
    {"cli"},
    {"__main__"},
]
"""From the bottom. A file imports from lower floors, and from its own folder."""

PRIVATE = ("torch.fx.experimental", "torch.fx.traceback", "torch.testing")
"""Modules of torch that are not public although their names have no underscore."""

each_file = pytest.mark.parametrize("name", FILES)


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def unit_of(name: str) -> str:
    """The file or folder directly under fcall/ to which a module belongs."""
    return name.split(".")[1] if "." in name else name


def floor_of(name: str) -> int:
    floors = [i for i, floor in enumerate(FLOORS) if unit_of(name) in floor]
    assert floors, f"{name} is on no floor: add it to FLOORS"
    return floors[0]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of all that is imported, also by a string that importlib may take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if parts[0] in ("fcall", "torch") and all(part.isidentifier() for part in parts):
                yield node.value


def modules_of_fcall(tree: ast.AST) -> set[str]:
    """The modules of fcall that a file imports, or imports names from."""
    found = set()
    for name in imported_names(tree):
        while name.startswith("fcall.") and name not in FILES:
            name = name.rpartition(".")[0]
        if name.startswith("fcall."):
            found.add(name)
    return found


@each_file
def test_imports_go_down(name: str) -> None:
    for imported in modules_of_fcall(tree_of(name)):
        if unit_of(imported) != unit_of(name):
            assert floor_of(imported) < floor_of(name), f"{name} imports {imported}"


def test_there_are_no_circles() -> None:
    imports = {name: modules_of_fcall(tree_of(name)) - {name} for name in FILES}
    while imports:
        leaves = {name for name, needs in imports.items() if not needs & imports.keys()}
        assert leaves, f"among these is a circle: {sorted(imports)}"
        imports = {name: needs for name, needs in imports.items() if name not in leaves}


def test_the_routes_do_not_know_each_other() -> None:
    for name in FILES:
        others = {"operator", "eager", "compiled", "program"} - {unit_of(name)}
        known = {unit_of(imported) for imported in modules_of_fcall(tree_of(name))}
        if unit_of(name) not in ("call", "fcall"):
            assert not known & others, name


# --- torch's private modules --------------------------------------------------------------------


def private_names(tree: ast.Module) -> list[str]:
    """Return what of torch a file uses that is private, by dotted names from ``torch`` on."""
    names = [name for name in imported_names(tree) if name.split(".")[0] == "torch"]
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            known.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        elif isinstance(node, ast.Import):
            torches = [a for a in node.names if a.name.split(".")[0] == "torch" and a.asname]
            known.update({a.asname or "": a.name for a in torches})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] in known:
                names.append(".".join((known[chain[0]], *chain[1:])))
    return sorted({name for name in names if _is_private(name)})


def _chain(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (chain := _chain(node.value)):
        return [*chain, node.attr]
    return []


def _is_private(name: str) -> bool:
    parts = name.split(".")
    underscored = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return underscored or any(f"{name}.".startswith(f"{module}.") for module in PRIVATE)


@pytest.mark.parametrize("name", [name for name in FILES if unit_of(name) != "_torch"])
def test_only_one_file_uses_torchs_private_modules(name: str) -> None:
    assert private_names(tree_of(name)) == []


def test_that_file_does_use_them() -> None:
    assert "torch._ops.HigherOrderOperator" in private_names(tree_of("fcall._torch"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch\ntorch._C._functorch.f()", "torch._C._functorch.f"),
        ("import torch as t\nt._dynamo.reset()", "torch._dynamo.reset"),
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._dynamo as d\nd.reset()", "torch._dynamo"),
        ("from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch import _guards", "torch._guards"),
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        ("from torch import fx\nfx._lazy_graph_module", "torch.fx._lazy_graph_module"),
        ("def f():\n    from torch.fx.experimental import x", "torch.fx.experimental.x"),
        ("import torch\ntorch.fx.experimental.x", "torch.fx.experimental.x"),
        ("import importlib\nimportlib.import_module('torch._dynamo')", "torch._dynamo"),
        ("import torch\ntorch.compile(torch.nn.Linear)\ntorch.__version__", None),
        ("from torch import nn\nnn.Module()._parameters", None),
        ("from fcall import _torch\n_torch.pytree", None),
        ("'''torch._dynamo is in a sentence.'''", None),
    ],
)
def test_the_search_for_private_modules(code: str, expected: str | None) -> None:
    found = private_names(ast.parse(code))
    assert expected in found if expected else found == []


# --- Sizes and the face -------------------------------------------------------------------------


@each_file
def test_no_file_is_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 500


def test_the_face_holds_imports_and_names_alone() -> None:
    lines = (ROOT / "__init__.py").read_text().splitlines()
    assert len(lines) < 70
    docstring, *body = tree_of("fcall").body
    assert isinstance(docstring, ast.Expr)
    targets = [
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert targets == ["__all__"]
    assert all(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in body)


@each_file
def test_every_file_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(tree_of(name))


@each_file
def test_names_in_all_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    for public in names:
        thing = getattr(module, public)
        ours = getattr(thing, "__module__", name).startswith("fcall")
        if name == "fcall" or (ours and callable(thing)):
            assert inspect.getdoc(thing), f"{name}.{public}"


def test_all_of_the_face_is_in_all() -> None:
    imported = {
        alias.asname or alias.name
        for node in tree_of("fcall").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imported) == sorted(fcall.__all__)


@pytest.mark.parametrize("then", ["", "fcall.functional_call(m, dict(m.named_parameters()), x)"])
def test_dynamo_is_not_imported(then: str) -> None:
    """It takes longer to import than all the rest of fcall, and eager calls do not need it."""
    lines = [
        "import sys, torch, fcall",
        "m, x = torch.nn.Linear(2, 2), torch.ones(1, 2)",
        then,
        "print([n for n in sys.modules if n.startswith(('torch._dynamo', 'torch._inductor'))])",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
