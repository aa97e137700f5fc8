"""A CPU kernel bound to a problem: its argument block, its tables and its workspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config
from ..codegen.entry import ENTRY_ARGUMENTS
from ..codegen.load import Kernel
from ..problem import DTYPES, ConvProblem
from .pages import LARGE_BYTES, ask_for_huge_pages
from .workspace import workspace

__all__ = ["CpuPlan"]


class CpuPlan:
    """Callable by ``launch(source, other, bias, out)`` with addresses; see :class:`faltung.dispatch.Plan` for which operand is which.

    ``block`` is the kernel's argument block, ``tables`` whatever memory its entries point to, ``workspace_bytes`` the scratch that a call needs.
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
    ) -> None:
        self.problem, self.implementation, self.kernel = problem, implementation, kernel
        self.workspace_bytes = workspace_bytes
        self._facts = facts
        self._block, self._tables = block, tuple(tables)
        self._function = kernel.function(ENTRY_ARGUMENTS)
        self._address = block.ctypes.data
        self._poison = config.current().poison
        self._out_bytes = _out_bytes(problem)
        self.launch: Callable[..., None] = self._launch if self._out_bytes < LARGE_BYTES else self._launch_large

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:
        address, keep = workspace(self.workspace_bytes, self._poison)
        self._function(self._address, source, other, bias, out, address)
        del keep

    def _launch_large(self, source: int, other: int, bias: int, out: int) -> None:
        ask_for_huge_pages(out, self._out_bytes)
        self._launch(source, other, bias, out)

    def describe(self) -> dict[str, Any]:
        return {"kernel": self.kernel.name, "isa": self.kernel.target.isa, "workspace_bytes": self.workspace_bytes, **self._facts}


def _out_bytes(problem: ConvProblem) -> int:
    """Bytes of what the problem's direction produces."""
    shape = {"forward": problem.output_shape, "grad_input": problem.input_shape, "grad_weight": problem.weight_shape}[problem.direction]
    return math.prod(shape) * DTYPES[problem.dtype]
