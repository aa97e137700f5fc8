"""What holds for every test: the same random numbers, outputs and workspaces that start as NaN, and only instruction sets that this processor has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from faltung import config
from faltung.cpu.target import runnable_targets

_tests_of: Counter[str] = Counter()
"""Tests that run code of an instruction set, by its name; those that this processor cannot run too."""


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(1)
    with config.override(poison=True):
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other instruction sets: they are counted, and named at the end, so that no run passes for more than it was."""
    here, kept, others = runnable_targets(), [], []
    _tests_of.clear()
    for item in items:
        names = {str(mark.args[0]) for mark in item.iter_markers("isa")}
        _tests_of.update(names)
        (kept if names <= {*here} else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands its counts to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tests_of"] = dict(_tests_of)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, count in getattr(node, "workeroutput", {}).get("tests_of", {}).items():
        _tests_of[name] = count  # every process collects all tests


def pytest_terminal_summary(terminalreporter: Any) -> None:
    here = runnable_targets()
    for title, names in (("instruction sets of this processor", here), ("other instruction sets, not run", sorted({*_tests_of} - {*here}))):
        counts = ", ".join(f"{name} ({_tests_of[name]} tests)" for name in names if _tests_of[name])
        if counts:
            terminalreporter.write_line(f"{title}: {counts}")
