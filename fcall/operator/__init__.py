"""The higher-order operator: one call of a module as one node of a captured graph. README first."""

from fcall.operator.call import bind, call, is_recorded, record_inlined

__all__ = ["bind", "call", "is_recorded", "record_inlined"]
