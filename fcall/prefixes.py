"""What stands before the names of weights: ``module.``, ``_orig_mod.``, or any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

__all__ = ["fitting_prefix", "prefixes_of"]


def fitting_prefix(names: Collection[str], known: Collection[str]) -> str:
    """Return the prefix, with its dot, without which most of ``names`` are known; or nothing.

    It has to explain half of one side, and more than what fits as it is: a single name that is too
    much is no matter of prefixes.
    """
    known = set(known)
    found = Counter(
        prefix
        for name in names
        for prefix in prefixes_of([name])
        if name.removeprefix(prefix) in known
    )
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    fit_as_they_are = len(known.intersection(names))
    enough = count > fit_as_they_are and 2 * count >= min(len(names), len(known))
    return prefix if enough else ""


def prefixes_of(names: Iterable[object]) -> list[str]:
    """Return all that names could be freed of: ``["a.", "a.b."]`` of ``"a.b.weight"``."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".") if isinstance(name, str) else ()
        for i in range(1, len(parts)):
            found[".".join(parts[:i]) + "."] = None
    return list(found)
