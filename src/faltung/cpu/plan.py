"""A CPU kernel bound to a problem: its argument block, its tables and its workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config
from ..codegen.entry import ENTRY_ARGUMENTS
from ..codegen.load import Kernel
from ..problem import ConvProblem
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
        self.launch: Callable[..., None] = self._launch

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:
        address, keep = workspace(self.workspace_bytes, self._poison)
        self._function(self._address, source, other, bias, out, address)
        del keep

    def describe(self) -> dict[str, Any]:
        return {"kernel": self.kernel.name, "isa": self.kernel.target.isa, "workspace_bytes": self.workspace_bytes, **self._facts}
