"""Runs a plan made for AArch64 under user-mode emulation: the kernel's object, linked with a main that reads its memory from a file."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
from faltung import testing
from faltung.codegen import load as loader
from faltung.cpu.target import TARGETS, Target

__all__ = ["COMPILER", "EMULATOR", "assembled", "run_emulated"]

EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
COMPILER = shutil.which("aarch64-linux-gnu-gcc")

MAIN = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
extern void entry(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
static int64_t number(FILE *f) { int64_t x; if (fread(&x, 8, 1, f) != 1) exit(2); return x; }
int main(int count, char **names) {
    (void)count;
    FILE *f = fopen(names[1], "rb");
    int64_t size = number(f), links = number(f), workspace = number(f), block = number(f);
    char *image = aligned_alloc(64, (size + 127) / 64 * 64);
    if (fread(image, 1, size, f) != (size_t)size) exit(3);
    for (int64_t i = 0; i < links; i++) { int64_t at = number(f), to = number(f), x = (int64_t)(image + to); memcpy(image + at, &x, 8); }
    int64_t operand[4], bytes[4];
    char *start[4];
    for (int i = 0; i < 4; i++) {
        bytes[i] = number(f);
        start[i] = malloc(bytes[i] + 512);
        memset(start[i], 0xA5, bytes[i] + 512);
        if (fread(start[i] + 256, 1, bytes[i], f) != (size_t)bytes[i]) exit(4);
        operand[i] = bytes[i] ? (int64_t)(start[i] + 256) : 0;
    }
    char *scratch = aligned_alloc(4096, (workspace + 8191) / 4096 * 4096);
    memset(scratch, 0xFF, workspace);
    entry((int64_t)(image + block), operand[0], operand[1], operand[2], operand[3], (int64_t)scratch);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 256; j++)
            if ((unsigned char)start[i][j] != 0xA5 || (unsigned char)start[i][256 + bytes[i] + j] != 0xA5) exit(5);
    for (int i = 2; i < 4; i++) fwrite(start[i] + 256, 1, bytes[i], stdout);
    return 0;
}
"""


class _Assembled:
    """Stands for a kernel that this machine cannot run."""

    def __init__(self, name: str, target: Target, code: bytes) -> None:
        self.name, self.target, self.code, self.address = name, target, code, 0

    def function(self, arguments: int) -> Any:
        def refuse(*_: int) -> None:
            raise RuntimeError(f"{self.name} is machine code of another processor")

        return refuse


@contextmanager
def assembled() -> Iterator[dict[str, bytes]]:
    """Inside, kernels for AArch64 are compiled but not loaded; the dictionary gets their objects by name."""
    objects: dict[str, bytes] = {}
    place = loader._place

    def keep(name: str, target: Target, code: bytes, entry: str) -> Any:
        if target.isa != "neon":
            return place(name, target, code, entry)
        objects[name] = code
        return _Assembled(name, target, code)

    loader._place = keep  # type: ignore[assignment]
    try:
        yield objects
    finally:
        loader._place = place
        for key in [key for key in loader._kernels if key[1].isa == TARGETS["neon"].isa]:
            del loader._kernels[key]


def _image(block: np.ndarray, tables: tuple[np.ndarray, ...]) -> tuple[bytes, list[tuple[int, int]], int]:
    """The block and the tables as one piece of memory, where in it addresses of it stand, and where the block begins."""
    image, places = b"", []
    for part in (*tables, block):
        image += b"\0" * (-len(image) % 64)
        places.append((part.ctypes.data, part.nbytes, len(image)))
        image += part.tobytes()
    words = np.frombuffer(image + b"\0" * (-len(image) % 8), np.int64)
    links = []
    for start, size, place in places:
        links += [(int(at) * 8, place + int(words[at]) - start) for at in np.flatnonzero((words >= start) & (words < start + max(size, 1)))]
    return image, links, places[-1][2]


def run_emulated(plan: Any, inputs: testing.Inputs, folder: Path) -> testing.Result:
    """The plan's result; one static program for each kernel is kept in ``folder``.  Raises CalledProcessError, 5 for a write outside of an operand."""
    problem = plan.problem
    program = folder / plan.kernel.name
    if not program.exists():
        (folder / "main.c").write_text(MAIN)
        (folder / "kernel.o").write_bytes(plan.kernel.code)
        subprocess.run([str(COMPILER), "-O1", "-static", "-o", str(program), str(folder / "main.c"), str(folder / "kernel.o")], check=True, capture_output=True)
    image, links, block = _image(plan.block, plan._tables)
    content = struct.pack("<4q", len(image), len(links), plan.workspace_bytes, block) + image + b"".join(struct.pack("<2q", *link) for link in links)
    stated = harness.operands(problem, inputs)
    sizes = [0 if o is None else o.bytes(problem.dtype) for o in stated]
    for operand, size in zip(stated, sizes):
        known = b"\xff" * size if operand is None or operand.tensor is None else _memory(operand.tensor)
        content += struct.pack("<q", size) + known
    (folder / "memory").write_bytes(content)
    done = subprocess.run([str(EMULATOR), str(program), str(folder / "memory")], check=True, capture_output=True, timeout=120)
    side, out = done.stdout[: sizes[2]], done.stdout[sizes[2] :]
    assert stated[3] is not None
    main = _tensor(out, problem.dtype).as_strided(stated[3].shape, stated[3].strides)
    return testing.Result(main, _tensor(side, problem.dtype) if side and problem.direction == "grad_weight" else None)


def _memory(tensor: torch.Tensor) -> bytes:
    return tensor.as_strided((tensor.numel(),), (1,)).clone().view(torch.uint8).numpy().tobytes()


def _tensor(content: bytes, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=testing.TORCH_DTYPES[dtype])
