"""What each call does to scoped dicts is the same in C as in Python."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compile_tests.support.needs import need_c
from fcall import passes
from fcall.passes import ABSENT
from fcall.scoped.context import open_scopes
from fcall.scoped.dicts import ScopedDict, _BaseInPython


class InPython(_BaseInPython):
    __slots__ = ()


def in_c() -> Any:
    """A class of dicts whose base is the one in C, or a skip."""
    need_c()
    return ScopedDict


@pytest.fixture(params=["Python", "C"])
def kind(request: pytest.FixtureRequest) -> Any:
    """Scoped dicts, in one of their two forms."""
    return InPython if request.param == "Python" else in_c()


class Call:
    """What a call with values for some dicts of two modules installs, and how."""

    def __init__(self) -> None:
        self.owners = [nn.Module(), nn.Module()]
        self.own: list[Any] = [{"a": 1, "b": 2}, {"c": 3}, {}]
        self.groups = [(0, "_parameters"), (1, "_parameters"), (1, "_buffers")]
        self.scopes = (5,)
        self.scope: dict[int, dict[str, Any]] = {}
        self.installed: list[Any] = []
        for (number, name), own in zip(self.groups, self.own):
            vars(self.owners[number])[name] = own

    def install(self, kind: Any) -> Any:
        arguments = self.owners, self.groups, [0, 0, 1, 2], self.scopes, self.scope, self.installed
        return kind.install(*arguments)

    def standing(self) -> list[Any]:
        return [vars(self.owners[number])[name] for number, name in self.groups]

    def is_untouched(self) -> bool:
        return all(one is other for one, other in zip(self.standing(), self.own))


def test_installing(kind: Any) -> None:
    call = Call()
    first, again, second, third = call.install(kind)
    assert first is again
    dicts = call.standing()
    assert {*map(type, dicts)} == {kind}
    assert [dict.copy(scoped) for scoped in dicts] == call.own  # what C code sees
    assert all(scoped.own is own for scoped, own in zip(dicts, call.own))
    assert all(scoped.scopes is call.scopes for scoped in dicts)
    assert list(call.scope) == [*map(id, dicts)]
    layers = list(call.scope.values())
    assert all(one is other for one, other in zip(layers, [first, second, third], strict=True))
    assert layers == [{}, {}, {}]
    homes = [(vars(call.owners[number]), name) for number, name in call.groups]
    assert [(home, name) for home, name, _ in call.installed] == homes
    assert all(scoped is entry[2] for scoped, entry in zip(dicts, call.installed, strict=True))


def test_uninstalling(kind: Any) -> None:
    call = Call()
    call.install(kind)
    assert kind.uninstall(call.installed, call.scopes) is True
    assert call.is_untouched()
    assert kind.uninstall(call.installed, call.scopes) is False  # again
    assert call.is_untouched()


def test_the_order_of_attributes_stays(kind: Any) -> None:
    call = Call()
    before = list(vars(call.owners[1]))
    call.install(kind)
    assert list(vars(call.owners[1])) == before
    kind.uninstall(call.installed, call.scopes)
    assert list(vars(call.owners[1])) == before


def _ordered(call: Call, kind: Any) -> None:
    call.own[1] = vars(call.owners[1])["_parameters"] = OrderedDict(c=3)


def _scoped(call: Call, kind: Any) -> None:
    call.own[2] = vars(call.owners[1])["_buffers"] = kind({})


@pytest.mark.parametrize("change", [_ordered, _scoped])
def test_what_is_not_plain_is_left_alone(kind: Any, change: Any) -> None:
    call = Call()
    change(call, kind)
    assert call.install(kind) is None
    assert call.is_untouched()
    assert (call.scope, call.installed) == ({}, [])


def test_what_is_not_there_is_left_alone(kind: Any) -> None:
    call = Call()
    call.groups[1] = (0, "none")
    assert call.install(kind) is None
    assert vars(call.owners[0])["_parameters"] is call.own[0]
    assert (call.scope, call.installed) == ({}, [])


def _joined(call: Call) -> None:
    call.standing()[2].scopes = (5, 6)


def _replaced(call: Call) -> None:
    vars(call.owners[1])["_buffers"] = {}


def _deleted(call: Call) -> None:
    del vars(call.owners[1])["_buffers"]


@pytest.mark.parametrize("change", [_joined, _replaced, _deleted])
def test_uninstalling_does_nothing_after(kind: Any, change: Callable[[Call], None]) -> None:
    call = Call()
    call.install(kind)
    change(call)
    before = [dict(vars(owner)) for owner in call.owners]
    assert kind.uninstall(call.installed, call.scopes) is False
    after = [dict(vars(owner)) for owner in call.owners]
    assert [[*map(id, entries.values())] for entries in before] == [
        [*map(id, entries.values())] for entries in after
    ]


# --------------------------------------------------------------------------------------- reading

KEYS = st.sampled_from("abc")
SMALL = st.dictionaries(KEYS, st.integers(0, 3) | st.just(ABSENT))


def _seen(scoped: Any, layers: list[dict[str, Any] | None]) -> list[Any]:
    """What is read of ``scoped`` by who is in scopes with these layers, or none, over it."""
    scopes = [{} if layer is None else {id(scoped): layer} for layer in layers]
    open_scopes.set(tuple(scopes))
    found = [(key in scoped, scoped._read(key)) for key in "abc"]
    for key, (is_there, value) in zip("abc", found):
        if is_there:
            assert scoped[key] is value
        else:
            assert value is ABSENT
            with pytest.raises(KeyError) as info:
                scoped[key]
            assert info.value.args == (key,)
    return found


@given(
    st.dictionaries(KEYS, st.integers(0, 3)), st.lists(st.none() | SMALL, max_size=3), st.booleans()
)
def test_reading_is_the_same_in_both(own: Any, layers: Any, is_plain: bool) -> None:
    found = []
    for kind in (InPython, in_c()):
        scoped = kind(own)
        scoped.own, scoped.scopes = own if is_plain else OrderedDict(own), ()
        found.append(copy_context().run(_seen, scoped, layers))
    assert found[0] == found[1]


def test_what_stands_for_nothing_cannot_be_read(kind: Any) -> None:
    scoped = kind({"a": 1})
    for read in (lambda: scoped["a"], lambda: "a" in scoped, lambda: scoped.scopes):
        with pytest.raises(AttributeError):
            read()


def test_keys_that_fail(kind: Any) -> None:
    class Key:
        def __hash__(self) -> int:
            return hash("a")

        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

    call = Call()
    layer, *_ = call.install(kind)
    scoped = call.standing()[0]
    for scopes in ((), (call.scope,)):
        layer["a"] = 1
        token = open_scopes.set(scopes)
        try:
            for read in (scoped.__getitem__, scoped.__contains__):
                with pytest.raises(TypeError, match="unhashable"):
                    read([])
                with pytest.raises(ZeroDivisionError):
                    read(Key())
        finally:
            open_scopes.reset(token)
    kind.uninstall(call.installed, call.scopes)


# ------------------------------------------------------------------------------ the C by itself


def test_cycles_are_collected(kind: Any) -> None:
    class Kept:
        pass

    scoped, kept = kind({}), Kept()
    scoped.own, scoped.scopes = {"itself": scoped, "kept": kept}, (1,)
    reference = weakref.ref(kept)
    del scoped, kept
    gc.collect()
    assert reference() is None


def _calls(kind: Any) -> Iterator[Callable[[], Any]]:
    call, other = Call(), Call()
    _ordered(other, kind)

    def there_and_back() -> None:
        call.scope.clear()
        call.installed.clear()
        layer = call.install(kind)[0]
        layer["a"] = ABSENT
        token = open_scopes.set((call.scope,))
        for scoped in call.standing():
            [key in scoped and scoped[key] for key in "abc"]
        open_scopes.reset(token)
        kind.uninstall(call.installed, call.scopes)
        kind.uninstall(call.installed, call.scopes)

    yield there_and_back
    yield lambda: other.install(kind)


def test_nothing_leaks() -> None:
    kind = in_c()
    for call in _calls(kind):
        call()
        gc.collect()
        watched = None, ABSENT, kind, 5
        before = len(gc.get_objects()), *map(sys.getrefcount, watched)
        for _ in range(1000):
            call()
        gc.collect()
        after = len(gc.get_objects()), *map(sys.getrefcount, watched)
        assert all(abs(one - other) < 100 for one, other in zip(before, after))


MODULE = nn.Module()

BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "nothing": ("install", ()),
    "no sequences": ("install", (1, 2, 3, (), {}, [])),
    "no tuple of scopes": ("install", ([], [], [], [], {}, [])),
    "no scope": ("install", ([], [], [], (), [], [])),
    "no list to note places in": ("install", ([], [], [], (), {}, ())),
    "no pair": ("install", ([MODULE], [1], [], (), {}, [])),
    "too short a pair": ("install", ([MODULE], [(0,)], [], (), {}, [])),
    "no number": ("install", ([MODULE], [("0", "_buffers")], [], (), {}, [])),
    "a number out of range": ("install", ([MODULE], [(1, "_buffers")], [], (), {}, [])),
    "a number below 0": ("install", ([MODULE], [(-1, "_buffers")], [], (), {}, [])),
    "a name that is not hashable": ("install", ([MODULE], [(0, [])], [], (), {}, [])),
    "no such group": ("install", ([MODULE], [(0, "_buffers")], [1], (), {}, [])),
    "no number of a group": ("install", ([MODULE], [(0, "_buffers")], ["0"], (), {}, [])),
    "nothing to uninstall": ("uninstall", ()),
    "no places": ("uninstall", ([1], ())),
    "too short a place": ("uninstall", ([({}, "a")], ())),
    "no dict": ("uninstall", ([({}, "a", {})], ())),
    "no home": ("uninstall", ([(1, "a", {})], ())),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    before = dict(vars(MODULE))
    with pytest.raises((IndexError, TypeError)):
        getattr(in_c(), name)(*arguments)
    assert all(vars(MODULE)[key] is value for key, value in before.items())


def test_bad_arguments_of_the_class() -> None:
    in_c()
    for arguments in ((), (1, ABSENT), (open_scopes,)):
        with pytest.raises(TypeError):
            passes.scoped_base(*arguments)  # type: ignore[misc]
