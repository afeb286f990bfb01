"""Calls prepared ahead of time: compiled, traced, exported."""

from fcall.program.compile import CompiledCall, compile
from fcall.program.export import export
from fcall.program.program import Program
from fcall.program.signature import Input, Signature
from fcall.program.trace import trace

__all__ = ["CompiledCall", "Input", "Program", "Signature", "compile", "export", "trace"]
