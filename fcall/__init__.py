"""Call an ``nn.Module`` as a pure function of its parameters and buffers, for compilers to see."""

from fcall import errors, func, functorch, stateless
from fcall.batch_norm import replace_all_batch_norm_modules_
from fcall.call import functional_call
from fcall.compiled import CompiledCall, compile
from fcall.ensemble import Ensemble
from fcall.meta import meta_copy
from fcall.patch import patch_torch
from fcall.program import (
    PackageInfo,
    Program,
    Runner,
    Signature,
    export,
    load,
    package,
    package_info,
    trace,
)
from fcall.routes import Route, record_routes
from fcall.stacking import stack_module_state
from fcall.state import State, open_state
from fcall.substitute import substitute
from fcall.version import __version__

__all__ = [
    "CompiledCall",
    "Ensemble",
    "PackageInfo",
    "Program",
    "Route",
    "Runner",
    "Signature",
    "State",
    "__version__",
    "compile",
    "errors",
    "export",
    "func",
    "functional_call",
    "functorch",
    "load",
    "meta_copy",
    "open_state",
    "package",
    "package_info",
    "patch_torch",
    "record_routes",
    "replace_all_batch_norm_modules_",
    "stack_module_state",
    "stateless",
    "substitute",
    "trace",
]
