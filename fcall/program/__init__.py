"""Calls as graphs to keep: traced, exported, packaged.

=====================  ============================================================================
``trace``, ``export``  ``caller`` (the module as torch.export is to see it), ``exported`` (from its
                       programs to flat graphs, and back), ``signature``, ``program``, ``derived``
``package``, ``load``  ``archive`` (what is kept in the file), ``graph_call``, ``info``
=====================  ============================================================================
"""

from fcall.program.export import export
from fcall.program.info import PackageInfo, package_info
from fcall.program.package import Runner, load, package
from fcall.program.program import Program
from fcall.program.signature import Input, Signature
from fcall.program.trace import trace

__all__ = [
    "Input",
    "PackageInfo",
    "Program",
    "Runner",
    "Signature",
    "export",
    "load",
    "package",
    "package_info",
    "trace",
]
