"""Compare random calls of random modules with the oracle for as long as asked: `make fuzz`.

An example is made from its seed alone, so that a failure is replayed by the command it prints.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Sequence
from random import Random

from compile_tests.support import differential, ways


def main(argv: Sequence[str] | None = None) -> int:
    """Run examples until the time is up or one fails; return the exit status."""
    options = _options(argv)
    start = time.monotonic()
    count = 0
    for seed in itertools.count(options.seed):
        compiled = options.compiled or count % options.compiled_every == options.compiled_every - 1
        try:
            if compiled:
                differential.check(Random(seed), ways.compiled, faults=False)
            else:
                differential.check(Random(seed))
        except Exception:  # noqa: BLE001, whatever it is: it is the news
            print(traceback.format_exc())
            flag = " --compiled" if compiled else ""
            print(f"replay: python -m compile_tests.fuzz --only{flag} --seed {seed} ")
            if not options.keep_going:
                return 1
        count += 1
        if options.only or time.monotonic() - start > options.minutes * 60:
            break
    print(f"{count} examples from seed {options.seed} on")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compile_tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="the first; by default of the clock")
    parser.add_argument("--only", action="store_true", help="the first example alone")
    parser.add_argument("--compiled", action="store_true", help="every example compiled")
    parser.add_argument("--compiled-every", type=int, default=500, metavar="N", help="one in N")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failure")
    options = parser.parse_args(argv)
    if options.seed is None:
        options.seed = int(time.time()) * 1000
    return options


if __name__ == "__main__":
    raise SystemExit(main())
