"""Dicts and attributes that differ by scope behave as the plain ones that they replace."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from compile_tests.support.threads import in_a_thread, run_beside, switching
from fcall.passes import ABSENT
from fcall.scoped import Scope, ScopedCache, ScopedDict, opened, own_dict


def owner_of(entries: dict[str, Any]) -> nn.Module:
    """Return a module with these entries, which need be no tensors, for ``_buffers``."""
    module = nn.Module()
    module.__dict__["_buffers"] = entries
    return module


def scope_over(owner: nn.Module, values: dict[str, Any]) -> Scope:
    """Return a scope, not open yet, in which ``values`` stand in the module's dict."""
    scope = Scope()
    scope.layer_of_dict(owner, "_buffers").update(values)
    return scope


# --- beside a plain dict ------------------------------------------------------------------------

KEYS = "abcd"
Operation = Callable[[dict[str, Any]], Any]


def _ior(d: dict[str, Any], other: dict[str, Any]) -> None:
    d |= other


def _outcome(operation: Operation, d: dict[str, Any]) -> Any:
    try:
        return operation(d)
    except KeyError as error:
        return KeyError, error.args
    except TypeError:
        return TypeError


keys, numbers = st.sampled_from(KEYS), st.integers(0, 3)
small = st.dictionaries(keys, numbers)

OPERATIONS: list[Callable[..., Operation]] = [
    lambda k, v, o: lambda d: d[k],
    lambda k, v, o: lambda d: d.get(k),
    lambda k, v, o: lambda d: d.get(k, v),
    lambda k, v, o: lambda d: k in d,
    lambda k, v, o: lambda d: d.__setitem__(k, v),
    lambda k, v, o: lambda d: d.__delitem__(k),
    lambda k, v, o: lambda d: d.pop(k),
    lambda k, v, o: lambda d: d.pop(k, v),
    lambda k, v, o: lambda d: d.setdefault(k, v),
    lambda k, v, o: lambda d: d.update(o),
    lambda k, v, o: lambda d: d.update(o.items(), d=v),
    lambda k, v, o: lambda d: d.clear(),
    lambda k, v, o: lambda d: _ior(d, o),
    lambda k, v, o: lambda d: d | o,
    lambda k, v, o: lambda d: o | d,
    lambda k, v, o: lambda d: d == o,
    lambda k, v, o: lambda d: o == d,
    lambda k, v, o: lambda d: d != o,
    lambda k, v, o: lambda d: len(d),
    lambda k, v, o: lambda d: bool(d),
    lambda k, v, o: lambda d: dict(d),
    lambda k, v, o: lambda d: {**d},
    lambda k, v, o: lambda d: d.copy(),
    lambda k, v, o: lambda d: copy.copy(d),
    lambda k, v, o: lambda d: copy.deepcopy(d),
    lambda k, v, o: lambda d: pickle.loads(pickle.dumps(d)),
    lambda k, v, o: lambda d: d.fromkeys(o, v),
    lambda k, v, o: lambda d: hash(d),
    lambda k, v, o: lambda d: [k] in d,  # not hashable
]
ORDERED: list[Callable[..., Operation]] = [
    lambda k, v, o: lambda d: [*d],
    lambda k, v, o: lambda d: [*reversed(d)],
    lambda k, v, o: lambda d: [*d.keys()],
    lambda k, v, o: lambda d: [*d.values()],
    lambda k, v, o: lambda d: [*d.items()],
    lambda k, v, o: lambda d: d.popitem(),
    lambda k, v, o: repr,
]
"""Those whose result tells the order of the keys."""

operations = st.builds(
    lambda make, *args: make(*args), st.sampled_from(OPERATIONS + ORDERED), keys, numbers, small
)
unordered = st.builds(
    lambda make, *args: make(*args), st.sampled_from(OPERATIONS), keys, numbers, small
)


@given(small, small, st.lists(operations, max_size=12))
def test_outside_of_a_scope(own: dict[str, Any], values: dict[str, Any], todo: Any) -> None:
    """To those who are not in it, there is none: not in one result, nor in the order of keys."""
    owner, plain = owner_of(own), dict(own)
    scope = scope_over(owner, values)
    inside = copy_context()
    inside.run(scope.open)
    for operation in todo:
        scoped = owner._buffers
        assert type(scoped) is ScopedDict
        assert _outcome(operation, scoped) == _outcome(operation, plain)
        assert [*scoped.items()] == [*plain.items()]
        assert [*dict.items(scoped)] == [*plain.items()]  # what C code sees
    inside.run(scope.close)
    assert owner._buffers is own
    assert [*own.items()] == [*plain.items()]


@given(small, small, st.lists(unordered, max_size=12))
def test_inside_of_a_scope(own: dict[str, Any], values: dict[str, Any], todo: Any) -> None:
    """The dict is one with the values in it. What else is written is the module's own."""
    owner, plain, before = owner_of(own), {**own, **values}, dict(own)
    scope = scope_over(owner, values)
    scope.open()
    try:
        for operation in todo:
            assert _outcome(operation, owner._buffers) == _outcome(operation, plain)
            assert owner._buffers == plain
            assert {*owner._buffers} == {*plain}
            assert len(owner._buffers) == len(plain)
    finally:
        scope.close()
    kept = {key: value for key, value in plain.items() if key not in values}
    assert owner._buffers is own
    assert own == {**kept, **{key: before[key] for key in values if key in before}}


@given(small, small, st.lists(st.tuples(st.booleans(), unordered), max_size=12))
def test_both_at_once(own: dict[str, Any], values: dict[str, Any], todo: Any) -> None:
    """Each finds what it has written itself, and of the other what is not in the scope."""
    owner, outside = owner_of(own), dict(own)
    scope, layer = scope_over(owner, values), dict(values)
    context = copy_context()
    context.run(scope.open)
    for is_inside, operation in todo:
        if is_inside:
            plain = {**{k: v for k, v in outside.items() if k not in values}, **layer}
            assert context.run(_outcome, operation, owner._buffers) == _outcome(operation, plain)
            layer = {k: v for k, v in plain.items() if k in values}
            rest = {k: v for k, v in plain.items() if k not in values}
            outside = {**{k: v for k, v in outside.items() if k in values}, **rest}
        else:
            assert _outcome(operation, owner._buffers) == _outcome(operation, outside)
        seen = context.run(owner._buffers.copy)
        assert seen == {**{k: v for k, v in outside.items() if k not in values}, **layer}
        assert owner._buffers == outside
    context.run(scope.close)
    assert own == outside
    assert owner._buffers is own


def test_a_dict_that_is_changed_while_it_is_read() -> None:
    """By another thread: what is read is some state of it, not an error."""
    owner = owner_of({"a": 1, "b": 2})
    scope = scope_over(owner, {"a": 3})

    def write() -> None:
        for i in range(500):
            owner._buffers[str(i)] = i
        for i in range(500):
            del owner._buffers[str(i)]

    def read() -> None:
        found = owner._buffers
        assert (found["a"], found.get("b"), "b" in found) == (1, 2, True)
        assert {"a", "b"} <= {*found} & {*found.keys()} & {*found.copy()}
        assert len(found.items()) >= 2

    with switching():
        scope.open()
        run_beside([read, read], write)
        assert owner._buffers == {"a": 3, "b": 2}
        scope.close()
    assert type(owner._buffers) is dict


# --- scopes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_scopes_closed_in_any_order(order: tuple[int, ...]) -> None:
    owner = owner_of({"a": 0})
    scopes = [scope_over(owner, {"a": i + 1}) for i in range(3)]
    for scope in scopes:
        scope.open()
    left = [1, 2, 3]
    assert len(opened) == 3
    for number in order:
        assert owner._buffers["a"] == left[-1]
        scopes[number].close()
        left.remove(number + 1)
    assert owner._buffers == {"a": 0}
    assert type(owner._buffers) is dict
    assert not opened


def test_closing_twice_or_without_opening() -> None:
    owner = owner_of({"a": 0})
    scope = scope_over(owner, {"a": 1})
    assert owner._buffers["a"] == 0  # not open yet
    scope.close()
    assert type(owner._buffers) is dict
    scope.close()
    assert not opened


def test_closing_in_another_thread() -> None:
    owner = owner_of({"a": 0})
    scope = scope_over(owner, {"a": 1})
    scope.open()
    in_a_thread(scope.close)
    assert owner._buffers == {"a": 0}
    assert type(owner._buffers) is dict
    assert not opened


def test_what_is_inherited_ends_with_the_scope() -> None:
    owner = owner_of({"a": 0})
    scope = scope_over(owner, {"a": 1})
    scope.open()
    inherited = copy_context()
    entries = owner._buffers
    assert inherited.run(lambda: owner._buffers["a"]) == 1
    scope.close()
    assert inherited.run(lambda: (owner._buffers["a"], entries["a"])) == (0, 0)


def test_hiding_and_showing() -> None:
    owner = owner_of({"a": 0})
    scope = scope_over(owner, {"a": 1})
    scope.open()
    before = scope.hide()
    assert owner._buffers["a"] == 0
    scope.show(before)
    assert owner._buffers["a"] == 1
    scope.close()
    assert owner._buffers["a"] == 0


def test_a_dict_that_the_module_replaces() -> None:
    """By another one, in the scope: that is the module's own from then on."""
    owner = owner_of({"a": 0})
    scope = scope_over(owner, {"a": 1})
    scope.open()
    owner.__dict__["_buffers"] = new = {"a": 5}
    scope.close()
    assert owner._buffers is new


def test_own_dict() -> None:
    owner = owner_of(own := {"a": 0})
    scope = scope_over(owner, {"a": 1})
    assert own_dict(own) is own
    assert own_dict(owner._buffers) is own
    scope.open()
    assert own_dict(owner._buffers) is owner._buffers
    assert in_a_thread(lambda: own_dict(owner._buffers)) is own
    scope.close()


def test_tasks() -> None:
    owner = owner_of({"a": 0})

    async def task(number: int) -> None:
        scope = scope_over(owner, {"a": number})
        scope.open()
        for _ in range(3):
            await asyncio.sleep(0)
            assert owner._buffers["a"] == number
        scope.close()
        assert owner._buffers["a"] == 0

    async def main() -> None:
        await asyncio.gather(*map(task, range(1, 5)))

    asyncio.run(main())
    assert type(owner._buffers) is dict


# --- attributes ---------------------------------------------------------------------------------


class Base(nn.Module):
    """With an attribute of the class, a method, and attributes of the instance only."""

    plain: Any = "of the class"

    def method(self) -> str:
        return "method"


class Derived(Base):
    """Inherits them."""


def attribute_scope(owner: nn.Module, kind: type, **values: Any) -> Scope:
    """Return a scope, not open yet, in which ``values`` are attributes of ``owner``."""
    scope = Scope()
    scope.layer_of_attributes(owner, kind, *values).update(values)
    return scope


def _get(owner: Any, name: str) -> Any:
    return getattr(owner, name, "none")


@pytest.mark.parametrize("kind", [Base, Derived])
def test_attributes(kind: type[Base]) -> None:
    names = [*vars(kind)]
    owner, other = kind(), kind()
    owner.plain, owner.own = "owner's", "own"
    scope = attribute_scope(owner, kind, plain="given", own="given too")
    scope.open()
    assert (owner.plain, owner.own) == ("given", "given too")
    assert in_a_thread(lambda: (owner.plain, owner.own)) == ("owner's", "own")
    # Others of the class, and the class itself, are as they were.
    assert (other.plain, _get(other, "own")) == ("of the class", "none")
    assert (kind.plain, _get(kind, "own")) == ("of the class", "none")
    other.plain = "other's"
    assert (other.plain, Base().plain, Derived().plain) == ("other's", *["of the class"] * 2)
    owner.plain = "set in the scope"
    del owner.own
    assert (owner.plain, _get(owner, "own")) == ("set in the scope", "none")
    with pytest.raises(AttributeError):
        del owner.own
    assert in_a_thread(lambda: (owner.plain, owner.own)) == ("owner's", "own")
    in_a_thread(lambda: setattr(owner, "own", "new"))
    scope.close()
    assert (owner.plain, owner.own, other.plain) == ("owner's", "new", "other's")
    assert [*vars(kind)] == names
    assert kind.plain == "of the class"


def test_an_attribute_deleted_in_the_scope() -> None:
    """What the class has is found then."""
    owner = Derived()
    owner.plain = "owner's"
    scope = attribute_scope(owner, Derived, plain="given")
    scope.open()
    del owner.plain
    assert owner.plain == "of the class"
    scope.close()
    assert owner.plain == "owner's"


@pytest.mark.parametrize("kind", [Base, Derived])
def test_an_attribute_in_place_of_a_method(kind: type[Base]) -> None:
    owner, other = kind(), kind()
    owner.method = "owner's"  # type: ignore[assignment, method-assign]
    scope = attribute_scope(owner, kind, method="given")
    scope.open()
    assert (owner.method, other.method(), kind.method(other)) == ("given", "method", "method")
    scope.close()
    assert (owner.method, other.method()) == ("owner's", "method")


def test_scopes_over_attributes_of_a_class_and_its_base() -> None:
    one, other = Base(), Derived()
    one.plain, other.plain = "one's", "other's"
    first, second = attribute_scope(one, Base, plain=1), attribute_scope(other, Derived, plain=2)
    first.open()
    second.open()
    assert (one.plain, other.plain, Derived().plain) == (1, 2, "of the class")
    first.close()
    assert (one.plain, other.plain, Derived().plain) == ("one's", 2, "of the class")
    second.close()
    assert (one.plain, other.plain, Derived().plain) == ("one's", "other's", "of the class")
    assert "plain" not in vars(Derived)


def test_absent_values() -> None:
    owner = owner_of({"a": 0, "b": 1})
    owner.plain = 2
    scope = scope_over(owner, {"a": ABSENT})
    scope.layer_of_attributes(owner, type(owner), "plain")["plain"] = ABSENT
    scope.open()
    assert owner._buffers == {"b": 1}
    assert "a" not in owner._buffers
    assert not hasattr(owner, "plain")
    scope.close()
    assert owner._buffers == {"a": 0, "b": 1}
    assert owner.plain == 2


# --- the cache of parametrizations --------------------------------------------------------------


def test_a_cache_for_each_scope() -> None:
    cache = ScopedCache({"key": "own"})
    scope = Scope()
    scope.open()
    assert cache.get("key") is None
    cache["key"] = "in the scope"
    assert cache["key"] == "in the scope"
    assert in_a_thread(lambda: cache["key"]) == "own"
    assert ScopedCache({}).get("key") is None  # a later one knows nothing of it
    inherited = copy_context()
    scope.close()
    assert cache["key"] == inherited.run(cache.get, "key") == "own"


def test_torchs_cache_is_replaced_as_long_as_a_scope_is_open() -> None:
    before = parametrize._cache
    one, other = Scope(), Scope()
    one.open()
    replaced = parametrize._cache
    other.open()
    one.close()
    assert parametrize._cache is replaced
    assert type(replaced) is ScopedCache
    other.close()
    assert parametrize._cache is before
