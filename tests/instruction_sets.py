"""The parameter ``isa`` of tests that run code: one test for each instruction set, of which a machine runs those that it has (see conftest)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from faltung.cpu.target import TARGETS

__all__ = ["each_isa", "needs_isa"]


def needs_isa(name: str) -> pytest.MarkDecorator:
    """The test runs code of this instruction set."""
    return pytest.mark.isa(name)


def each_isa(names: Iterable[str] = TARGETS) -> pytest.MarkDecorator:
    """One test for each of these instruction sets."""
    return pytest.mark.parametrize("isa", [pytest.param(name, marks=needs_isa(name)) for name in names])
