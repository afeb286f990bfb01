"""The passes over all of a call's parameters do the same in C as in Python, and refuse the same."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compile_tests.support.needs import need_c
from fcall import passes
from fcall.identity import identities
from fcall.passes import ABSENT, STORES

PYTHON = SimpleNamespace(
    look=passes.look_in_python,
    put_in=passes.put_in_in_python,
    put_back=passes.put_back_in_python,
    are_in=passes.are_in_in_python,
    are_plain=passes.are_plain_in_python,
    having=passes.having_in_python,
)


def in_c() -> Any:
    """The passes in C, or a skip."""
    need_c()
    return passes


@pytest.fixture(params=["Python", "C"])
def p(request: pytest.FixtureRequest) -> Any:
    """The passes, in one of their two forms."""
    return PYTHON if request.param == "Python" else in_c()


class Held:
    """Stands for a module: three dicts."""

    def __init__(self, *dicts: dict[str, Any]) -> None:
        self.__dict__.update(zip(STORES, (*dicts, {}, {}, {})))


def dicts_of(owners: list[Any]) -> list[Any]:
    return [getattr(owner, kind) for owner in owners for kind in STORES]


def expected(owners: list[Any]) -> tuple[Any, ...]:
    """What ``look`` is to be given for owners to be as they are now."""
    dicts = dicts_of(owners)
    held = tuple(value for entries in dicts for value in entries.values())
    keys = tuple(key for entries in dicts for key in entries)
    return tuple(map(weakref.ref, owners)), tuple(map(len, dicts)), keys, identities(held)


def three() -> list[Any]:
    """Owners, the second of them without anything."""
    parts = [nn.Linear(1, 1), nn.Linear(1, 1)]
    return [
        Held({"w": 1.5, "b": 2.5}, {"n": 3.5}, {"0": parts[0], "1": parts[1]}),
        Held(),
        parts[0],
    ]


# --------------------------------------------------------------------------------------- look


def test_look_picks_what_is_asked_for(p: Any) -> None:
    owners = three()
    found = p.look(*expected(owners), (0, 0, 1), (0, 1), (0, 1, 2), (3, 6))
    first = owners[0]
    wanted = [
        owners,
        [first._parameters, first._parameters, first._buffers],
        [first._parameters, first._buffers],
        [first._parameters["w"], first._parameters["b"], first._buffers["n"]],
        [first._modules["0"], owners[2]._parameters["bias"]],
    ]
    assert [[*map(id, part)] for part in found] == [[*map(id, part)] for part in wanted]


def _reordered(owners: list[Any]) -> None:
    owners[0]._parameters["w"] = owners[0]._parameters.pop("w")


def _equal_value(owners: list[Any]) -> None:
    owners[0]._parameters["w"] = float("1.5")


CHANGES: dict[str, Callable[[list[Any]], Any]] = {
    "a value replaced": lambda o: o[0]._parameters.update(w=9.5),
    "a value replaced by an equal one": _equal_value,
    "a value replaced by None": lambda o: o[2]._parameters.update(bias=None),
    "an entry added": lambda o: o[0]._parameters.update(c=1.5),
    "an entry added where there was none": lambda o: o[1]._buffers.update(c=1.5),
    "an entry deleted": lambda o: o[0]._buffers.clear(),
    "an entry moved": lambda o: o[1]._buffers.update(n=o[0]._buffers.pop("n")),
    "an entry renamed": lambda o: o[0]._buffers.update(m=o[0]._buffers.pop("n")),
    "the order": _reordered,
    "another dict": lambda o: o[0].__dict__.update(_parameters={"w": 0.0, "b": 0.0}),
    "a dict of another class": lambda o: o[0].__dict__.update(_buffers=OrderedDict(n=0.0)),
    "an owner gone": lambda o: o.pop(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_look_notices(p: Any, change: Callable[[list[Any]], Any]) -> None:
    owners = three()
    known = expected(owners)
    assert p.look(*known, (), (), (), (), None) is not None
    change(owners)
    gc.collect()
    assert p.look(*known, (), (), (), (), None) is None


def test_look_is_not_troubled_by_what_is_the_same(p: Any) -> None:
    owners = three()
    known = expected(owners)
    first = owners[0]
    first.__dict__["_parameters"] = dict(first._parameters)  # another dict of the same
    first.__dict__["more"] = 1
    references, lengths, keys, ids = known
    equal_keys = tuple("".join(list(key)) for key in keys)  # which are other objects
    assert not any(key is other for key, other in zip(keys, equal_keys) if len(key) > 1)
    assert p.look(references, lengths, equal_keys, ids, (), (), (), (), None) is not None


class Attributes:
    """Stands for a module whose dicts are no entries of its ``__dict__``, as scripted ones are."""

    def __init__(self) -> None:
        self.held = {"w": 0.5}

    @property
    def _parameters(self) -> Any:
        return self.held

    _buffers = _modules = property(lambda self: {})


@pytest.mark.parametrize("kind", ["ordered dict", "properties", "slots"])
def test_look_takes_what_is_not_plain(p: Any, kind: str) -> None:
    owner: Any = Held(OrderedDict(w=0.5))
    if kind == "properties":
        owner = Attributes()
    elif kind == "slots":

        class Slots:
            __slots__ = ("__weakref__", *STORES)

        owner = Slots()
        owner._parameters, owner._buffers, owner._modules = {"w": 0.5}, {}, {}
    held = (owner._parameters["w"],)
    known = (weakref.ref(owner),), (1, 0, 0), ("w",), identities(held)
    found = p.look(*known, (0,), (0,), (0,), (), None)
    assert found[0] == [owner]
    assert found[3][0] is held[0]


def test_look_at_what_stands_for_a_dict(p: Any) -> None:
    class Scoped(dict[str, Any]):
        own: dict[str, Any]

    def own_dict(entries: Any) -> Any:
        return entries.own if isinstance(entries, Scoped) else entries

    owners = three()
    known = expected(owners)
    scoped = Scoped()
    scoped.own = owners[0]._parameters
    owners[0].__dict__["_parameters"] = scoped
    found = p.look(*known, (0,), (0,), (0,), (), own_dict)
    assert found[1][0] is scoped.own
    assert p.look(*known, (0,), (0,), (0,), (), None) is None

    def fails(entries: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        p.look(*known, (), (), (), (), fails)


KEYS = st.sampled_from(["a", "b", "c", "weight", "bias"])
VALUES = st.sampled_from([object() for _ in range(4)])
OWNER = st.tuples(*[st.dictionaries(KEYS, VALUES, max_size=3)] * 3)


@given(st.lists(OWNER, max_size=3), st.lists(OWNER, max_size=3))
def test_look_finds_the_same_in_both(before: Any, after: Any) -> None:
    """Of any modules, expected to be as any others."""
    c = in_c()
    owners = [Held(*map(dict, dicts)) for dicts in before]
    known = expected(owners)
    for owner, dicts in zip(owners, after):
        owner.__dict__.update(zip(STORES, dicts))
    wanted = tuple(range(3 * len(owners))), (), tuple(range(len(known[2]))), ()
    found, in_python = c.look(*known, *wanted, None), PYTHON.look(*known, *wanted, None)
    assert found == in_python
    same = dicts_of(owners) == [entries for dicts in before for entries in dicts]
    in_order = [list(d) for d in dicts_of(owners)] == [list(d) for dicts in before for d in dicts]
    assert (found is not None) == (same and in_order)


# ------------------------------------------------------------------------- put_in and put_back


def swapped() -> dict[str, Any]:
    """Two dicts, the first of which has an entry that stays; what stood there, what is given."""
    one, other = {"a": "A", "kept": "K", "b": "B"}, {"c": "C"}
    return {
        "stores": [one, one, other],
        "keys": ["a", "b", "c"],
        "originals": ["A", "B", "C"],
        "given": ("1", "2", "3"),
        "taken": [],
        "dicts": [one, other],
        "lengths": [3, 1],
        "order": ["a", "kept", "b", "c"],
        "places": [0, -1, 1, 2],
    }


def test_put_in_and_back(p: Any) -> None:
    s = swapped()
    p.put_in(s["stores"], s["keys"], s["given"])
    assert s["dicts"] == [{"a": "1", "kept": "K", "b": "2"}, {"c": "3"}]
    assert p.put_back(*s.values()) is True
    assert s["dicts"] == [{"a": "A", "kept": "K", "b": "B"}, {"c": "C"}]
    assert list(s["dicts"][0]) == ["a", "kept", "b"]
    assert s["taken"] == ["1", "2", "3"]


MEANWHILE: dict[str, Callable[[Any], Any]] = {
    "a value reassigned": lambda s: s["dicts"][0].update(a="9"),
    "a value deleted": lambda s: s["dicts"][0].pop("a"),
    "what was kept deleted": lambda s: s["dicts"][0].pop("kept"),
    "an entry added": lambda s: s["dicts"][1].update(d="D"),
    "a value registered again": lambda s: s["dicts"][0].update(a=s["dicts"][0].pop("a")),
    "an entry moved": lambda s: s["dicts"][1].update(b=s["dicts"][0].pop("b")),
    "all deleted": lambda s: s["dicts"][1].clear(),
}


@pytest.mark.parametrize("change", MEANWHILE.values(), ids=MEANWHILE)
def test_put_back_does_nothing_after(p: Any, change: Callable[[Any], Any]) -> None:
    s = swapped()
    p.put_in(s["stores"], s["keys"], s["given"])
    change(s)
    before = [list(entries.items()) for entries in s["dicts"]]
    assert p.put_back(*s.values()) is False
    assert [list(entries.items()) for entries in s["dicts"]] == before
    assert s["taken"] == []


def test_put_back_lets_the_module_reassign_its_own(p: Any) -> None:
    s = swapped()
    p.put_in(s["stores"], s["keys"], s["given"])
    s["dicts"][0]["kept"] = "N"
    assert p.put_back(*s.values()) is True
    assert s["dicts"][0] == {"a": "A", "kept": "N", "b": "B"}


def test_put_back_twice(p: Any) -> None:
    """As after an interrupt: what was taken is still known."""
    s = swapped()
    p.put_in(s["stores"], s["keys"], s["given"])
    assert p.put_back(*s.values()) is True
    assert p.put_back(*s.values()) is False
    assert s["taken"] == ["1", "2", "3"]


def test_put_back_of_an_ordered_dict(p: Any) -> None:
    """Python may do it, C leaves it to who comes next: what it must not do is half of it."""
    s = swapped()
    s["dicts"][1] = s["stores"][2] = OrderedDict(c="C")
    p.put_in(s["stores"], s["keys"], s["given"])
    done = p.put_back(*s.values())
    assert s["dicts"][0]["a"] == ("A" if done else "1")
    assert s["dicts"][1]["c"] == ("C" if done else "3")


class Refusing(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise ZeroDivisionError


def test_put_in_what_is_no_plain_dict(p: Any) -> None:
    class Noting(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, (value,))

    noting = Noting()
    p.put_in([noting, {}], ["a", "a"], [1, 1])
    assert noting == {"a": (1,)}
    with pytest.raises(ZeroDivisionError):
        p.put_in([Refusing()], ["a"], [1])


def test_freed_values_may_run_code_of_anybody() -> None:
    """Also such as changes what is being written to."""
    for p in (PYTHON, in_c()):
        store: dict[str, Any] = {}

        class Rude:
            def __del__(self, store: dict[str, Any] = store) -> None:
                store.clear()

        store.update(a=Rude(), b=Rude())
        p.put_in([store, store], ["a", "b"], [1, 2])
        gc.collect()
        assert store in ({"b": 2}, {})


# --------------------------------------------------------------------------- are_in and having


def test_are_in(p: Any) -> None:
    stores: list[dict[str, Any]] = [{"a": REAL, "b": 1.5}, {"a": None}]
    arguments = [*stores, stores[0]], ["a", "a", "b"]
    assert p.are_in(*arguments, (REAL, None, stores[0]["b"])) is True
    assert p.are_in([], [], ()) is True
    assert p.are_in(*arguments, (REAL, None, float("1.5"))) is False  # equal, but another one
    assert p.are_in(*arguments, ()) is False
    assert p.are_in(stores, ["a", "c"], (REAL, None)) is False


@given(st.lists(st.dictionaries(KEYS, VALUES), max_size=3), st.lists(KEYS), st.lists(VALUES))
def test_are_in_says_the_same_in_both(dicts: Any, keys: Any, values: Any) -> None:
    c = in_c()
    keys, values = keys[: len(dicts)], values[: len(dicts)]
    stores = dicts[: len(keys)]
    for given_values in (values, passes.read(stores, keys)):
        if ABSENT not in given_values:
            assert c.are_in(stores, keys, given_values) is PYTHON.are_in(stores, keys, given_values)


def test_having(p: Any) -> None:
    class OfTheClass(nn.Module):
        first = None  # not the modules' own

    one, other = OfTheClass(), nn.Linear(1, 1)
    names = ["first", "second"]
    assert p.having([one, other], names) == []
    one.second = other.extra = None
    assert p.having([one, other, one], names) == [one, one]
    assert p.having((other, one), tuple(names)) == [one]
    assert p.having([], names) == p.having([one], []) == []


# ------------------------------------------------------------------------------------ are_plain

KINDS = (torch.Tensor, nn.Parameter)
REAL, META = torch.ones(1), torch.ones(1, device="meta")


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("things", "answer"),
    [
        ([], True),
        ([REAL, nn.Parameter(REAL)], True),
        ((REAL,) * 3, True),
        ([REAL, META], False),
        ([REAL.as_subclass(Subclass)], False),
        ([None], False),
        ([REAL, "text"], False),
    ],
)
def test_are_plain(p: Any, things: Any, answer: bool) -> None:
    assert p.are_plain(things, KINDS, torch.Tensor.is_meta) is answer


# ------------------------------------------------------------------------------ the C by itself


def _calls(c: Any) -> Iterator[Callable[[], Any]]:
    owners = three()
    known = expected(owners)
    yield lambda: c.look(*known, (0, 3), (1,), (0,), (1,), None)
    yield lambda: c.look(*known[:3], b"\0" * len(known[3]), (), (), (), (), None)
    s = swapped()

    def there_and_back() -> None:
        s["taken"].clear()
        c.put_in(s["stores"], s["keys"], s["given"])
        c.put_back(*s.values())
        c.put_back(*s.values())

    yield there_and_back
    yield lambda: c.are_plain([REAL, META], KINDS, torch.Tensor.is_meta)
    yield lambda: (c.are_in([{"a": REAL}], ["a"], [REAL]), c.are_in([{}], ["a"], [None]))
    yield lambda: c.having([owners[0], owners[2]], ("_parameters", "none"))
    ordered = [Held(OrderedDict(w=0.5))]
    known_ordered = expected(ordered)
    yield lambda: c.look(*known_ordered, (0,), (), (), (), None)


def test_nothing_leaks() -> None:
    for call in _calls(in_c()):
        call()
        gc.collect()
        before = len(gc.get_objects()), sys.getrefcount(None), sys.getrefcount(REAL)
        for _ in range(1000):
            call()
        gc.collect()
        after = len(gc.get_objects()), sys.getrefcount(None), sys.getrefcount(REAL)
        assert all(abs(one - other) < 100 for one, other in zip(before, after))


BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "nothing": ("look", ()),
    "no weak reference": ("look", ((1,), (0, 0, 0), (), b"", (), (), (), (), None)),
    "too few lengths": ("look", ((), (1,), (), b"", (), (), (), (), None)),
    "too few ids": ("look", ((), (), ("a",), b"", (), (), (), (), None)),
    "a number out of range": ("look", ((), (), (), b"", (0,), (), (), (), None)),
    "no number": ("look", ((), (), (), b"", ("a",), (), (), (), None)),
    "a list for a tuple": ("look", ([], (), (), b"", (), (), (), (), None)),
    "too few values": ("put_in", ([{}], ["a"], [])),
    "no sequences": ("put_in", (1, 2, 3)),
    "too few arguments": ("put_back", ([],)),
    "too few places": ("put_back", ([], [], [], [], [], [{}], [0], ["a"], [])),
    "a place out of range": ("put_back", ([], [], [], [], [], [{"a": 1}], [1], ["a"], [5])),
    "fewer keys than stores": ("are_in", ([{}], [], [1])),
    "no key": ("are_in", ([{}], [[]], [1])),
    "no sequence of values": ("are_in", ([], [], 1)),
    "no attributes": ("having", ([1], ["a"])),
    "no name": ("having", ([nn.Module()], [[]])),
    "no names": ("having", ([], 1)),
    "no flag": ("are_plain", ([], (), 1)),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD)
def test_bad_arguments_do_not_crash(name: str, arguments: tuple[Any, ...]) -> None:
    function = getattr(in_c(), name)
    try:
        answer = function(*arguments)
    except (IndexError, TypeError, ValueError):
        return
    assert answer is False


def _ask(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_python_can_be_asked_for() -> None:
    code = "from fcall import passes; print(passes.IN_C, passes.look is passes.look_in_python)"
    assert _ask(code, FCALL_PURE_PYTHON="1") == "False True"


def test_a_library_of_another_revision_is_left_alone() -> None:
    in_c()
    code = (
        "import sys, types; sys.modules['fcall._passes'] = types.SimpleNamespace(REVISION=0); "
        "from fcall import passes; print(passes.IN_C)"
    )
    assert _ask(code, FCALL_PURE_PYTHON="") == "False"


def test_absent_is_nothing_else() -> None:
    assert passes.read([{}, {"a": None}], ["a", "a"]) == [ABSENT, None]
