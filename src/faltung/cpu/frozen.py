"""Plans that keep their packed weights: a kernel's first stage runs once, and later calls start with the products.

A kernel packs (or transforms) its weights into the front of its workspace; behind them, from ``scratch_at`` on, every thread has scratch.  A frozen plan
owns the front.  Its calls pass that as the workspace, with no tasks for the packing stage, and a ``scratch_at`` that leads from there to the scratch of the
Python thread that calls: two threads may run one frozen plan at the same time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..codegen.entry import ArgumentBlock
from .pages import LARGE_BYTES, ask_for_huge_pages
from .tile import PAGE
from .workspace import workspace

if TYPE_CHECKING:
    from .plan import CpuPlan

__all__ = ["FrozenPlan", "Packing", "clear"]

_BLOCKS_KEPT = 16


@dataclass(frozen=True)
class Packing:
    """How a kernel packs its weights: the names of the arguments that count the tasks of its packing stage and of the one stage after it.

    ``arguments`` has ``scratch_at`` too, the size of what is packed.
    """

    arguments: ArgumentBlock
    pack: str
    compute: str

    def front_of(self, block: npt.NDArray[np.int64]) -> int:
        """Bytes of the packed weights of a plan with this argument block; each thread of the plan may have them."""
        return self.arguments.value(block, "front_pitch") or self.arguments.value(block, "scratch_at")

    def bytes_of(self, block: npt.NDArray[np.int64]) -> int:
        """Memory that keeping them takes."""
        return self.front_of(block) + PAGE


def clear(address: int) -> ctypes.c_int64:
    """The mark of :mod:`faltung.cpu.checked` at an address, taken away."""
    flag = ctypes.c_int64.from_address(address)
    flag.value = 0
    return flag


class FrozenPlan:
    """Launched as the plan is, with the same bits; the memory at ``bias`` may be read, that at ``other`` is only where results are not finite
    and the plan is checked.  Safe with threads."""

    def __init__(self, plan: CpuPlan, packing: Packing, other: int, bias: int) -> None:
        self._plan, self._packing = plan, packing
        self._front, self._scratch_at = packing.front_of(plan.block), packing.arguments.value(plan.block, "scratch_at")
        self._scratch_bytes = plan.workspace_bytes - self._scratch_at
        self._blocks: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}
        self._packed = np.empty(packing.bytes_of(plan.block), np.uint8)
        # Bytes that packing skips must compare equal: see share().
        self._packed.fill(0xFF if plan.poison else 0)
        self._address = -(-self._packed.ctypes.data // PAGE) * PAGE
        self.launch: Callable[..., None] = self._launch if plan.out_bytes < LARGE_BYTES else self._launch_large
        scratch, keep = workspace(self._scratch_bytes, plan.poison)
        block = self._block(scratch, packing.compute)
        plan.function(block.ctypes.data, 0, other, bias, 0, self._address)
        del keep

    @property
    def bytes(self) -> int:
        """Memory of the packed weights."""
        return self._packed.size

    def share(self, other: FrozenPlan) -> bool:
        """Drop the packed weights for those of ``other`` if they are the same, byte for byte."""
        if self._front != other._front or not np.array_equal(self._content(), other._content()):
            return False
        self._packed, self._address = other._packed, other._address
        self._blocks.clear()
        return True

    def shares(self, other: FrozenPlan) -> bool:
        """Whether both use the same memory."""
        return self._packed is other._packed

    def _content(self) -> npt.NDArray[np.uint8]:
        start = self._address - self._packed.ctypes.data
        return self._packed[start : start + self._front]

    def _block(self, scratch: int, without: str) -> npt.NDArray[np.int64]:
        return self._packing.arguments.replaced(self._plan.block, {"scratch_at": scratch - self._address, "front_pitch": 0, without: 0})

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:
        scratch, keep = workspace(self._scratch_bytes, self._plan.poison)
        block = self._blocks.get(scratch)
        if block is None:
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            fresh = self._block(scratch, self._packing.pack)
            block = self._blocks[scratch] = fresh.ctypes.data, fresh
        if not self._plan.flag_at:
            self._plan.function(block[0], source, other, bias, out, self._address)
            del keep
            return
        flag = clear(scratch + self._plan.flag_at - self._scratch_at)
        self._plan.function(block[0], source, other, bias, out, self._address)
        failed = flag.value
        del keep
        if failed:
            self._plan.again(source, other, bias, out)

    def _launch_large(self, source: int, other: int, bias: int, out: int) -> None:
        ask_for_huge_pages(out, self._plan.out_bytes)
        self._launch(source, other, bias, out)
