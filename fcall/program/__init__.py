"""Calls prepared ahead of time: compiled, traced, exported, packaged."""

from fcall.program.compile import CompiledCall, compile
from fcall.program.export import export
from fcall.program.info import PackageInfo, package_info
from fcall.program.package import Runner, load, package
from fcall.program.program import Program
from fcall.program.signature import Input, Signature
from fcall.program.trace import trace

__all__ = [
    "CompiledCall",
    "Input",
    "PackageInfo",
    "Program",
    "Runner",
    "Signature",
    "compile",
    "export",
    "load",
    "package",
    "package_info",
    "trace",
]
