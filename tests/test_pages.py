"""Large results are asked for in huge pages, and nothing but their own pages is spoken for."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

import faltung
from faltung.cpu import pages, plan
from faltung.cpu.pages import LARGE_BYTES, ask_for_huge_pages, whole_pages


def test_whole_pages_lie_inside() -> None:
    page = mmap.PAGESIZE
    assert whole_pages(3 * page, 2 * page) == (3 * page, 2 * page)
    assert whole_pages(3 * page + 1, 2 * page) == (4 * page, page)
    assert whole_pages(3 * page - 1, 2 * page + 2) == (3 * page, 2 * page)
    assert whole_pages(3 * page + 1, 5)[1] == 0


def test_contents_stay() -> None:
    values = np.arange(LARGE_BYTES // 8 + 1000)
    ask_for_huge_pages(values.ctypes.data, values.nbytes)
    assert (values == np.arange(values.size)).all()


@pytest.mark.parametrize(("size", "asked"), [(256, True), (255, False)])
def test_only_large_results(monkeypatch: pytest.MonkeyPatch, size: int, asked: bool) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(plan, "ask_for_huge_pages", lambda address, length: found.append((address, length)))
    faltung.dispatch.clear()
    weight = torch.randn(16, 3, 1, 1)
    with torch.no_grad():
        y = faltung.conv2d(torch.randn(1, 3, size, 256), weight)
    assert found == ([(y.data_ptr(), y.numel() * 4)] if asked else [])


@pytest.mark.skipif(pages._madvise is None, reason="no madvise")
def test_the_system_takes_the_advice() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system decides about huge pages by itself")
    size = 16 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        values = np.frombuffer(memory, np.uint8)
        address = values.ctypes.data
        ask_for_huge_pages(address, size)
        assert "hg" in _flags(address), "the mapping is not marked for huge pages"
        del values


def _flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            inside = start <= address < stop
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return []
