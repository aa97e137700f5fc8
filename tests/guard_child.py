"""Run by test_guard in a process of its own: every operand and the workspace lie against pages that must not be touched.

Standard input: JSON ``{"side": "end" | "start", "threads": n, "runs": [[implementation, problem], ...]}``.  Each problem is printed before it runs,
so that the last line names the one that ended the process; the last line of a good run is ``done <count>``.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys

import torch

import harness
from faltung import testing
from faltung.cpu import checked
from faltung.cpu import plan as plans
from faltung.problem import DTYPES, ConvProblem
from implementations import BOUNDS

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """``size`` bytes that end right before a forbidden page, or start right behind one; filled with NaN."""

    def __init__(self, size: int, side: str, align: int = 1) -> None:
        pages = max(1, -(-size // _PAGE)) + 1  # one to spare for the alignment
        self._memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        inside = base + _PAGE
        ctypes.memset(inside, 0xFF, pages * _PAGE)
        for guard in (base, inside + pages * _PAGE):
            if _libc.mprotect(guard, _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = inside if side == "start" else inside + (pages * _PAGE - size) // align * align
        self.size = size

    def put(self, content: bytes) -> None:
        ctypes.memmove(self.address, content, len(content))

    def get(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def _content(tensor: torch.Tensor) -> bytes:
    """The elements in the order in which they lie in memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.clone().view(torch.uint8).numpy().tobytes()


def run(implementation: str, problem: ConvProblem, side: str, threads: int) -> None:
    plan = harness.plan_named(implementation, problem, threads)
    inputs = testing.make_inputs(problem, integers=True)
    wanted = testing.rounded(problem, testing.exact(problem, inputs))
    placed: list[Guarded | None] = []
    for operand in harness.operands(problem, inputs):
        if operand is None:
            placed.append(None)
            continue
        memory = Guarded(operand.bytes(problem.dtype), side)
        if operand.tensor is not None:
            memory.put(_content(operand.tensor))
        placed.append(memory)
    plan.launch(*(0 if m is None else m.address for m in placed))
    third, out = harness.operands(problem, inputs)[2:]
    written = [(placed[3], out)] + ([(placed[2], third)] if third is not None and third.tensor is None else [])
    for want, (memory, operand) in zip(wanted, written, strict=True):
        assert memory is not None
        assert operand is not None
        flat = torch.frombuffer(bytearray(memory.get()), dtype=testing.TORCH_DTYPES[problem.dtype])
        got = flat.as_strided(operand.shape, operand.strides)
        close = torch.equal(got, want) if implementation not in BOUNDS else torch.dist(got, want) <= BOUNDS[implementation] * want.norm()
        assert close, f"wrong result of {implementation} for '{problem}'"


def main() -> None:
    order = json.load(sys.stdin)
    side = order["side"]

    def guarded_workspace(size: int, _poison: bool = False) -> tuple[int, object]:
        memory = Guarded(size, side, align=64)
        return memory.address, memory

    for module in (plans, checked):
        module.workspace = guarded_workspace  # type: ignore[assignment]
    assert set(DTYPES) == set(testing.TORCH_DTYPES)
    count = 0
    for implementation, text in order["runs"]:
        print(implementation, text, flush=True)
        run(implementation, ConvProblem.parse(text), side, order["threads"])
        count += 1
    print("done", count, flush=True)


if __name__ == "__main__":
    main()
