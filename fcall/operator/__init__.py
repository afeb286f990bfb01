"""The higher-order operator: one call of a module as one node of a captured graph. README first."""

from fcall.operator.call import call, is_recorded, placeholder_name

__all__ = ["call", "is_recorded", "placeholder_name"]
