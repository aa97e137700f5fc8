"""Matrices laid out anew for another plan: transposed, and in the compute type; and operands of plans that run plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..problem import ConvProblem
from . import target as targets
from .plan import CpuPlan
from .target import Target

__all__ = ["AS_IT_IS", "Laid", "LayKernel", "lay"]

ARGUMENTS = ArgumentBlock(("tasks", "shares", "rows", "columns"))
SHARE = 16
"""Rows of a task of :class:`LayKernel`."""


@dataclass(frozen=True)
class LayKernel:
    """Matrices ``[rows][columns]`` from the type in memory to the compute type, or ``back``, as they are or ``transposed``; one task for each matrix and
    :data:`SHARE` rows."""

    target: Target
    dtype: str
    transposed: bool
    back: bool = False

    @property
    def name(self) -> str:
        return f"lay_{self.dtype}{'_t' if self.transposed else ''}{'_back' if self.back else ''}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module, numeric = Module(), Numeric(self.dtype, self.target)
        lanes, sizes = numeric.lanes, (numeric.memory_bytes, numeric.compute_bytes)
        source_size, target_size = reversed(sizes) if self.back else sizes

        def stage(f: Function, task: Task) -> Callable[[Value], None]:
            def body(index: Value) -> None:
                rows, columns = task["rows"], task["columns"]
                image, first = index // task["shares"], index % task["shares"] * SHARE
                last = f.minimum(first + SHARE, rows)
                source, target = (task.operand(name) + image * rows * columns * bytes_ for name, bytes_ in (("source", source_size), ("out", target_size)))

                def move(at: Value, to: Value, count: int) -> None:
                    read, written = source + at * source_size, target + to * target_size
                    if self.back:
                        numeric.store(f, f.load(read, vector_type(numeric.compute, count)), written, count)
                    else:
                        f.store(numeric.load(f, read, count), written)

                def run(row: Value) -> None:
                    whole, start = f.integer("and", columns, -lanes), row * columns
                    f.loop(0, whole, lanes, lambda i: move(start + i, start + i, lanes))
                    f.loop(whole, columns, 1, lambda i: move(start + i, start + i, 1))

                if self.transposed:
                    f.loop(0, columns, 1, lambda i: f.loop(first, last, 1, lambda row: move(row * columns + i, i * rows + row, 1)))
                else:
                    f.loop(first, last, 1, run)

            return body

        emit_entry(module, ARGUMENTS, [("tasks", stage)])
        return module


@dataclass(frozen=True)
class Laid:
    """An operand of an inner plan: what ``plan`` makes of the problem's, ``at`` bytes into the buffer, or that itself where there is none."""

    plan: CpuPlan | None = None
    at: int = 0

    def laid(self, operand: int, buffer: int) -> int:
        """The address of the operand as the inner plan reads it."""
        if self.plan is None:
            return operand
        self.plan.launch(operand, 0, 0, buffer + self.at)
        return buffer + self.at


AS_IT_IS = Laid()


def lay(problem: ConvProblem, matrices: int, rows: int, columns: int, threads: int, transposed: bool = False, back: bool = False) -> CpuPlan:
    """A plan, as a part of the one for ``problem``, that writes ``[matrices][rows][columns]`` in the compute type, or ``back``."""
    kernel = LayKernel(targets.target(), problem.dtype, transposed, back)
    shares = -(-rows // SHARE)
    block = ARGUMENTS.pack(threads, {"tasks": matrices * shares, "shares": shares, "rows": rows, "columns": columns})
    return CpuPlan(problem, "lay", load(kernel.name, kernel.target, kernel.emit), block, [], 0, {})
