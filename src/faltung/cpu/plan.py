"""A CPU kernel bound to a problem: its argument block, its tables and its workspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config
from ..codegen.builtin import STACK_BYTES
from ..codegen.entry import ENTRY_ARGUMENTS, OPERANDS, THREADS
from ..codegen.load import Kernel
from ..problem import DTYPES, ConvProblem
from .frozen import FrozenPlan, Packing
from .machine import floor, predicted_seconds
from .pages import LARGE_BYTES, ask_for_huge_pages
from .target import host_target
from .workspace import WITHIN, workspace

__all__ = ["CpuPlan"]


class CpuPlan:
    """Callable by ``launch(source, other, bias, out)`` with addresses; see :class:`faltung.dispatch.Plan` for which operand is which.

    ``block`` is the kernel's argument block, ``tables`` whatever memory its entries point to, ``workspace_bytes`` the scratch that a call needs.
    ``packing``: how weights are packed, where keeping them pays; ``when_frozen`` makes the plan that keeps them, where that is another one.
    """

    def __init__(
        self,
        problem: ConvProblem,
        implementation: str,
        kernel: Kernel,
        block: npt.NDArray[np.int64],
        tables: Sequence[npt.NDArray[Any]],
        workspace_bytes: int,
        facts: dict[str, Any],
        packing: Packing | None = None,
    ) -> None:
        self.problem, self.implementation, self.kernel = problem, implementation, kernel
        self.workspace_bytes = workspace_bytes
        self._facts = facts
        self.block, self._tables = block, tuple(tables)
        self.packing = packing
        self.when_frozen: Callable[[], CpuPlan] | None = None
        self.flag_at = 0  # that of a CheckedPlan, which is never at the start of a workspace
        self.function = kernel.function(ENTRY_ARGUMENTS)
        self._address = block.ctypes.data
        self.poison = config.current().poison
        self.out_bytes = math.prod(problem.result_shape) * DTYPES[problem.dtype]
        self.launch: Callable[..., None] = self._launch if self.out_bytes < LARGE_BYTES else self._launch_large
        if workspace_bytes <= STACK_BYTES and self.out_bytes < LARGE_BYTES and not self.poison:
            self.launch = kernel.function_on_stack(len(OPERANDS), block, workspace_bytes, self._tables)

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:
        usable, address, keep = WITHIN.kept
        if usable < self.workspace_bytes or self.poison:
            address, keep = workspace(self.workspace_bytes, self.poison)
        self.function(self._address, source, other, bias, out, address)
        del keep

    def _launch_large(self, source: int, other: int, bias: int, out: int) -> None:
        ask_for_huge_pages(out, self.out_bytes)
        self._launch(source, other, bias, out)

    def again(self, source: int, other: int, bias: int, out: int) -> None:
        """Write results that were not finite once more; see :class:`faltung.cpu.checked.CheckedPlan`."""
        raise NotImplementedError

    def freeze(self, other: int, bias: int) -> FrozenPlan | None:
        """The plan with the weights at ``other`` (and the bias) packed once and for all; None where there is nothing to keep."""
        plan = self._to_freeze()
        return None if plan.packing is None else FrozenPlan(plan, plan.packing, other, bias)

    def describe_frozen(self) -> dict[str, Any]:
        """:meth:`describe` for the plan that is frozen, and ``frozen_bytes``, the memory that it keeps."""
        plan = self._to_freeze()
        return {**plan.describe(), "frozen_bytes": 0 if plan.packing is None else plan.packing.bytes_of(plan.block)}

    def _to_freeze(self) -> CpuPlan:
        return self if self.when_frozen is None else self.when_frozen()._to_freeze()

    def describe(self) -> dict[str, Any]:
        """What the plan says of itself; on the host also the time predicted, and the floor: what arithmetic or memory alone would take."""
        facts = {"kernel": self.kernel.name, "isa": self.kernel.target.isa, "workspace_bytes": self.workspace_bytes, **self._facts}
        if self.kernel.target.isa != host_target().isa:
            return facts
        threads = int(self.block[THREADS])
        least = floor(self.problem, self.kernel.target, threads, facts.get("products"))
        if "predicted_cycles" in facts:
            facts["predicted_seconds"] = predicted_seconds(facts["predicted_cycles"], threads, least)
        return {**facts, "floor_seconds": least.seconds, "floor_set_by": least.bound}
