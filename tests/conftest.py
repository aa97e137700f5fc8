"""What holds for every test: the same random numbers, and outputs and workspaces that start as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from faltung import config


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(1)
    with config.override(poison=True):
        yield
