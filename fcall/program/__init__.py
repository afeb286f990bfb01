"""Calls prepared ahead of time: compiled, traced, exported, packaged."""

from fcall.program.compile import CompiledCall, compile
from fcall.program.export import export
from fcall.program.package import Runner, load, package
from fcall.program.program import Program
from fcall.program.signature import Input, Signature
from fcall.program.trace import trace

__all__ = [
    "CompiledCall",
    "Input",
    "Program",
    "Runner",
    "Signature",
    "compile",
    "export",
    "load",
    "package",
    "trace",
]
