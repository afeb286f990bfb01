"""Runs the examples of README.md, docs/ and the docstrings as tests.

The examples of one document share their names and run in order; a document runs in an empty folder.
`<!-- skip: next "needs a GPU" -->` leaves one out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compile_tests.support.threads import alone

try:
    from sybil import Sybil
    from sybil.document import PythonDocStringDocument
    from sybil.integration.pytest import SybilItem
    from sybil.parsers.doctest import DocTestParser
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
except ImportError:  # single test files run without it; `make setup` installs it
    Sybil = None


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-timeout, let its setting in pyproject.toml pass."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "not used: pytest-timeout is not installed")


@pytest.fixture(autouse=True)
def _count_no_thread_of_the_runner() -> Iterator[None]:
    """A call asks whether other threads live; in a test run with pytest-xdist one always does."""
    with alone():
        yield


def _enter_document(namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    namespace["_came_from"], namespace["_folder"] = os.getcwd(), folder
    os.chdir(folder.name)


def _leave_document(namespace: dict[str, Any]) -> None:
    torch.compiler.reset()
    os.chdir(namespace["_came_from"])
    namespace["_folder"].cleanup()


if Sybil is not None:
    _in_markdown = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=["README.md", "docs/*.md"],
        setup=_enter_document,
        teardown=_leave_document,
    )
    _in_docstrings = Sybil(
        parsers=[DocTestParser(), PythonCodeBlockParser()],
        patterns=["fcall/*.py", "fcall/**/*.py"],
        document_types={".py": PythonDocStringDocument},
        setup=_enter_document,
        teardown=_leave_document,
    )
    pytest_collect_file = (_in_markdown + _in_docstrings).pytest()

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Leave the examples out of `make test-fast`."""
        for item in items:
            if isinstance(item, SybilItem):
                item.add_marker(pytest.mark.compiled)
                item.add_marker(pytest.mark.inductor)


TOGETHER = {"compile_tests/test_kernels_triton.py"}
"""The files whose tests share something that takes long to make."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a document's examples, and the tests of some files, with one worker each.

    Other tests go to whichever is free.

    xdist's own `--dist loadgroup` does not find its groups in the ids of pytest 9.2 (xdist 3.8).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByDocument(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, name = nodeid.partition("::")
            return path if name.startswith("line:") or path in TOGETHER else nodeid

    return ByDocument(config, log) if config.getoption("dist") == "load" else None
