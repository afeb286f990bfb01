"""Calls prepared ahead of time: compiled, exported."""

from fcall.program.compile import CompiledCall, compile
from fcall.program.export import export

__all__ = ["CompiledCall", "compile", "export"]
