"""Call an ``nn.Module`` as a pure function of its parameters and buffers, for compilers to see."""

from fcall import errors
from fcall.call import functional_call
from fcall.program import CompiledCall, compile, export
from fcall.routes import Route, record_routes

__all__ = [
    "CompiledCall",
    "Route",
    "compile",
    "errors",
    "export",
    "functional_call",
    "record_routes",
]
__version__ = "0.1.0"
