"""Asks every question, each in a process of its own, and draws the answers.

A process of its own, since what one question leaves behind would be in the figures of the next:
threads, caches of the compiler, patched modules.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

QUESTIONS = (
    "eager_call",
    "compiled_call",
    "blocks",
    "compile_time",
    "weight_sets",
    "cuda_graphs",
    "ensembles",
    "per_sample_gradients",
    "jacobians",
    "maml",
    "threads",
    "serving",
)

ON_A_GPU = {"cuda_graphs"}
"""Those that are asked elsewhere only by name."""


def main() -> int:
    """Run what the command line names, and return how many questions failed."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--quick", action="store_true", help="rough figures, not stored")
    parser.add_argument("--peers", action="store_true", help="with tensordict and JAX")
    options = parser.parse_args()
    if unknown := set(options.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    # Fails here, and not once a question, where PERF_DEVICE is not there.
    from perf.timing import DEVICE

    print(f"device: {DEVICE.type}", flush=True)
    of_device = [name for name in QUESTIONS if DEVICE.type == "cuda" or name not in ON_A_GPU]
    asked = options.questions or of_device
    flags = ["--quick"] * options.quick + ["--peers"] * options.peers
    failed = []
    for number, name in enumerate(asked, 1):
        print(f"[{number}/{len(asked)}] {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-m", f"perf.{name}", *flags]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"[{number}/{len(asked)}] {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if not options.quick and "PERF_RESULTS" not in os.environ:
        _draw()
    if failed:
        print(f"perf: FAILED: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def _draw() -> None:
    try:
        from perf import plots
    except ImportError as error:  # the records are stored: they can be drawn elsewhere
        print(f"no plots: {error}; where matplotlib is: python -m perf.plots")
    else:
        plots.main()


if __name__ == "__main__":
    sys.exit(main())
