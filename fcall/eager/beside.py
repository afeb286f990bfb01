"""Values beside the live module's own dicts, seen by one thread or task alone.

For when others may look. The module's own tensors stay where they are; see :mod:`fcall.scoped`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fcall import _torch
from fcall.binding import ATTRIBUTE, BYPASS
from fcall.eager.swap import Swap
from fcall.eager.traced import teach_dynamo
from fcall.passes import ABSENT, are_in, having, put_in, read
from fcall.scoped import Scope
from fcall.substitution import Bypasses, Store, delete_absent

__all__ = ["Beside"]


class Beside(Swap):
    """Values over the module's own, for the thread or task that put them there."""

    _exposed: Sequence[tuple[Store, str, Any]] = ()
    _scope: Scope | None = None
    _stores: Sequence[Store] = ()
    _written = False

    def _put_in(self, values: Sequence[Any], originals: Sequence[Any] | None = None) -> None:
        layout, owners, _, rnns, _, _, _ = self.substitution  # as quick as to ask for one of them
        self._scope = scope = Scope()
        if _torch.dynamo_is_imported():
            teach_dynamo()
            self._leave_compiled_code(scope)
        if layout.group_of_each:
            self._stores = scope.layers_of_dicts(owners, layout.groups, layout.group_of_each)
        else:
            self._find_stores(scope)
        put_in(self._stores, layout.keys, values)
        self._written = True
        for rnn in rnns:
            names = "_flat_weights", "_flat_weight_refs"
            seen = [list(getattr(rnn, name)) for name in names]
            scope.layer_of_attributes(rnn, nn.RNNBase, *names).update(zip(names, seen))
        scope.open()

    def _find_stores(self, scope: Scope) -> None:
        """Note where each value is to be written, and which of them everybody will see."""
        to = self.substitution
        layers: dict[tuple[int, str], Store | None] = {}
        stores = []
        for (number, store, key), own in zip(to.layout.places, to.stores):
            kind = (number, f"{store}.{key}" if store == ATTRIBUTE else store)
            if kind not in layers:
                layers[kind] = _layer_over(scope, to.owners[number], store, key)
            layer = layers[kind]
            stores.append(own if layer is None else layer)
        self._stores = stores
        self._exposed = [
            (own, key, own.get(key, ABSENT))
            for own, store, key in zip(to.stores, stores, to.layout.keys)
            if own is store
        ]

    def _leave_compiled_code(self, scope: Scope) -> None:
        """Have the compiled submodules in which values stand run uncompiled: see ``traced.py``."""
        to = self.substitution
        compiled = having(to.owners, _torch.COMPILED_ATTRIBUTES)
        if not compiled:
            return
        written = {id(to.owners[number]) for number, _, _ in to.layout.places}
        for module in compiled:
            if not written.isdisjoint(map(id, module.modules())):
                attributes = _torch.attributes_when_not_compiled(module)
                layer = scope.layer_of_attributes(module, type(module), *attributes)
                layer.update(attributes)

    def _read(self) -> Sequence[Any]:
        stores, keys = self._stores, self.substitution.layout.keys
        return self.given if are_in(stores, keys, self.given) else read(stores, keys)

    def _take_out(self) -> Sequence[Any]:
        if self._scope is None:
            return self._taken
        if self._written:
            self._taken, self._written = self._read(), False
        if self._exposed:
            exposed = list(zip(*self._exposed))
            put_in(*exposed)
            delete_absent(*exposed)
            self._exposed = ()
        self._scope.close()
        self._scope = None
        return self._taken

    def _hide(self) -> Callable[[], Any]:
        scope = self._scope
        if scope is None:
            return lambda: None
        return functools.partial(scope.show, scope.hide())


def _layer_over(scope: Scope, owner: nn.Module, store: str, key: str) -> Store | None:
    """Return where to write what is to be read in ``store`` of ``owner``, in the scope alone.

    None if there is no such thing: for what a scripted submodule keeps, or a property.
    """
    if store == BYPASS:
        layer = scope.layer_of_dict(owner.parametrizations, "_modules")  # type: ignore[arg-type]
        return Bypasses(layer)
    if store == ATTRIBUTE:
        return scope.layer_of_attributes(owner, type(owner), key) if key in vars(owner) else None
    return scope.layer_of_dict(owner, store) if store in vars(owner) else None
