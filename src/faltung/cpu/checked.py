"""Plans whose kernels look at their results, and are followed by another plan where one is not finite.

Sums of bfloat16 parts (:mod:`faltung.cpu.parts`) are NaN where they should be infinite, and operands with zeros in the place of pixels that do not exist
make NaN of zero times infinity.  Such kernels look at every sum that they write (:func:`still_finite`) and leave a mark in their workspace; the plan that is
right for all numbers then writes the whole result again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from ..codegen.emit import Function, Value, vector_type
from ..codegen.load import Kernel
from ..problem import ConvProblem
from .frozen import Packing, clear
from .pages import LARGE_BYTES, ask_for_huge_pages
from .plan import CpuPlan
from .workspace import workspace

__all__ = ["FLAG_BYTES", "CheckedPlan", "mark_unless_finite", "still_finite"]

FLAG_BYTES = 64
"""Room for the mark, a line of its own."""


def still_finite(f: Function, state: Value, value: Value) -> Value:
    """``state`` (zeros to begin with), with NaN in the lanes where ``value`` is not finite."""
    return f.fma(value, f.zero(value.type), state)


def mark_unless_finite(f: Function, state: Value, flag: Value, lanes: int) -> None:
    """Write 1 to the i64 at ``flag`` where a lane of ``state`` is NaN."""
    broken = f.define(vector_type("i1", lanes), f"fcmp uno {state}, {state.text}")
    bits = f.cast("bitcast", broken, f"i{lanes}") if lanes > 1 else broken
    with f.when(f.define("i1", f"icmp ne {bits}, 0")):
        f.store(f.value(1), flag)


class CheckedPlan(CpuPlan):
    """A :class:`~faltung.cpu.plan.CpuPlan` whose kernel writes 1 to the i64 ``flag_at`` bytes into its workspace where a result is not finite.

    ``instead`` makes the plan for the same problem that then writes the results; it is called once, when it is first needed.
    """

    def __init__(
        self,
        problem: ConvProblem,
        implementation: str,
        kernel: Kernel,
        block: npt.NDArray[Any],
        tables: Sequence[npt.NDArray[Any]],
        workspace_bytes: int,
        facts: dict[str, Any],
        flag_at: int,
        instead: Callable[[], CpuPlan],
        packing: Packing | None = None,
    ) -> None:
        super().__init__(problem, implementation, kernel, block, tables, workspace_bytes, facts, packing)
        self.flag_at, self._instead = flag_at, instead
        self._other: CpuPlan | None = None
        self.launch = self._launch_checked

    def _launch_checked(self, source: int, other: int, bias: int, out: int) -> None:
        if self.out_bytes >= LARGE_BYTES:
            ask_for_huge_pages(out, self.out_bytes)
        address, keep = workspace(self.workspace_bytes, self.poison)
        flag = clear(address + self.flag_at)
        self.function(self._address, source, other, bias, out, address)
        failed = flag.value
        del keep
        if failed:
            self.again(source, other, bias, out)

    def again(self, source: int, other: int, bias: int, out: int) -> None:
        """Write the results by the plan that is right for all numbers."""
        if self._other is None:
            self._other = self._instead()
        self._other.launch(source, other, bias, out)
