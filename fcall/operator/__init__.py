"""The higher-order operator: one call of a module as one node of a captured graph. README first."""

from fcall.operator.call import (
    bind,
    call,
    call_placed,
    is_recorded,
    place,
    record_inlined,
)

__all__ = ["bind", "call", "call_placed", "is_recorded", "place", "record_inlined"]
