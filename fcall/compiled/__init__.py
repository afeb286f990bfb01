"""Calls of compiled code, at a cost near its own.

==================================  ===============================================================
``compile``                         ``fcall.compile``, and which of two ways each call takes
``fast``                            what a fast call checks, before it runs the compiled code
``frames``                          what Dynamo compiles; ``inductor`` compiles its graphs
``structure``                       whether the module is built as it was
``weight_sets``                     which weights CUDA graphs read where they are
``cache``, ``record``, ``sources``  what was compiled, on disk
==================================  ===============================================================
"""

from fcall.compiled.compile import CompiledCall, compile

__all__ = ["CompiledCall", "compile"]
