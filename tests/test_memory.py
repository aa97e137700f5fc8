"""Peak memory: no padding mode costs more than zeros, forward and backward, and a workspace is bounded."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from faltung.cpu import workspace as workspaces
from faltung.problem import PADDING_MODES

MIB = 1 << 20
INPUT = 24 * MIB
ALLOWED = 12 * MIB  # bounded buffers, and the first touch of pages of code

CHILD = """
import re, sys, torch
from pathlib import Path
if sys.argv[1] == "stock":
    import torch.nn as nn
else:
    import faltung as nn

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(2)
fmt = getattr(torch, sys.argv[2])
for mode in sys.argv[3:]:
    conv = nn.Conv2d(12, 12, 3, padding=1, padding_mode=mode)
    for turn in range(2):  # the first one compiles
        x = torch.empty(2, 12, 512, 512, memory_format=fmt).fill_(0.5).requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        y = conv(x)
        y.backward(y.detach())
        peak = status("VmHWM") - before
        del x, y
    print(mode, peak)
"""


@functools.cache
def peaks(engine: str, fmt: str) -> dict[str, int]:
    """By padding mode, the bytes that one layer forward and backward needs at its peak besides its input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, engine, fmt, *PADDING_MODES], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {mode: int(number) for mode, number in (line.split() for line in done.stdout.splitlines())}
    assert set(found) == set(PADDING_MODES)
    return found


@pytest.mark.parametrize("fmt", ("contiguous_format", "channels_last"))
def test_a_padding_mode_costs_what_zeros_cost(fmt: str) -> None:
    found = peaks("faltung", fmt)
    assert found["zeros"] >= 2 * INPUT, "the output and the gradient of the input must show"
    for mode, number in found.items():
        assert number <= found["zeros"] + ALLOWED, f"{mode}: {found}"


def test_the_measurement_sees_a_padded_copy() -> None:
    """PyTorch's own layer keeps a padded copy of the input: if that does not show, nothing would."""
    found = peaks("stock", "contiguous_format")
    assert found["reflect"] > found["zeros"] + INPUT // 2


def test_zeros_cost_no_more_than_stock() -> None:
    assert peaks("faltung", "contiguous_format")["zeros"] <= peaks("stock", "contiguous_format")["zeros"] + ALLOWED


def test_a_large_workspace_is_given_back() -> None:
    _, kept = workspaces.workspace(1 << 16)
    assert kept is workspaces.WITHIN.kept[2]
    before = workspaces.WITHIN.kept[2]
    address, large = workspaces.workspace(workspaces.KEPT_BYTES + 1)
    assert large is not None
    assert large is not workspaces.WITHIN.kept[2]
    assert workspaces.WITHIN.kept[2] is before
    assert address % 4096 == 0
    assert workspaces.workspace(0)[1] is before


def test_a_poisoned_workspace_is_nan_in_every_type() -> None:
    workspaces.workspace(1 << 20)
    address, buffer = workspaces.workspace(4096, poison=True)
    assert buffer is not None
    start = address - buffer.ctypes.data
    assert (buffer[start : start + 4096 + (64 << 10)] == 0xFF).all()
