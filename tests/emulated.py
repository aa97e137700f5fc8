"""Runs a plan made for AArch64 on an emulated processor: the kernel's object is linked into memory in which every operand ends at a forbidden page."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import harness
from faltung import testing
from faltung.codegen import load as loader
from faltung.codegen.compile import compile_object
from faltung.cpu.target import TARGETS, Target

try:
    import unicorn
    from unicorn import arm64_const as registers
except ImportError:  # not needed on AArch64, and there are no wheels for some other machines
    unicorn = None

__all__ = ["AVAILABLE", "assembled", "run_emulated"]

AVAILABLE = unicorn is not None
_PAGE = 4096
_CANARY = 0xA5
_SPACING = 1 << 32
"""Bytes between the starts of two pieces of memory: nothing is mapped in between."""
_CODE, _IMAGE, _STACK, _SCRATCH, _OPERANDS = (i * _SPACING for i in range(1, 6))
_RETURN = _CODE + (1 << 30)
_STACK_BYTES = 1 << 20
_ADR_PAGE, _ADD_LOW, _JUMP, _CALL, _ADDRESS_PAGE, _ADDRESS_LOW = 275, 277, 282, 283, 311, 312
_LOAD_EIGHT = 286
_LOAD_LOW = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
"""Kinds of relocations; those of loads and stores with the logarithm of their size."""


class _Assembled:
    """Stands for a kernel that this machine cannot run."""

    def __init__(self, name: str, target: Target, code: dict[str, bytes]) -> None:
        self.name, self.target, self.code, self.address = name, target, code, 0

    def function(self, arguments: int) -> Any:
        def refuse(*_: int) -> None:
            raise RuntimeError(f"{self.name} is machine code of another processor")

        return refuse

    def function_on_stack(self, arguments: int, *_: Any) -> Any:
        return self.function(arguments)


@contextmanager
def assembled() -> Iterator[dict[str, bytes]]:
    """Inside, kernels for AArch64 are compiled but not loaded; the dictionary gets their units' objects by symbol."""
    objects: dict[str, bytes] = {}
    place = loader._place

    def keep(name: str, target: Target, parts: Iterable[loader.Unit]) -> Any:
        if target.isa != "neon":
            return place(name, target, parts)
        code = {part.symbol: objects.get(part.symbol) or compile_object(part.text, target) for part in parts}
        objects.update(code)
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


class _Object:
    """An object's sections that belong into memory, put behind what is there already, and the addresses of its symbols."""

    def __init__(self, code: bytes, memory: bytearray) -> None:
        self._code, self._starts = code, {}
        (table,), (size, count) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<2H", code, 58)
        self._sections = [struct.unpack_from("<2I4Q2I2Q", code, table + i * size) for i in range(count)]
        for i, (_, _, flags, _, offset, length, _, _, align, _) in enumerate(self._sections):
            if flags & 2:  # belongs into memory
                memory += bytes(-len(memory) % max(align, 1))
                self._starts[i] = _CODE + len(memory)
                memory += code[offset : offset + length]
        self._symbols: list[tuple[str, int | None]] = []
        self.public: dict[str, int] = {}
        for _, kind, _, _, offset, length, link, _, _, _ in self._sections:
            for at in range(offset, offset + length if kind == 2 else offset, 24):
                name_at, facts, _, section, value, _ = struct.unpack_from("<I2BH2Q", code, at)
                text = self._sections[link][4] + name_at
                name = code[text : code.index(b"\0", text)].decode()
                address = self._starts[section] + value if section in self._starts else None
                self._symbols.append((name, address))
                if facts >> 4 == 1 and address is not None:
                    self.public[name] = address

    def relocate(self, memory: bytearray, elsewhere: dict[str, int]) -> None:
        """Put addresses into the code: its own, and those of other objects' functions by their symbols."""
        places: dict[str, int] = {}
        for _, kind, _, _, offset, length, _, info, _, _ in self._sections:
            for at in range(offset, offset + length if kind == 4 and info in self._starts else offset, 24):
                place, what, addend = struct.unpack_from("<2Qq", self._code, at)
                name, address = self._symbols[what >> 32]
                if address is None:
                    address = elsewhere[name]
                kind_of_place = what & 0xFFFFFFFF
                if kind_of_place in (_ADDRESS_PAGE, _ADDRESS_LOW):  # of a place that holds the address
                    if name not in places:
                        memory += bytes(-len(memory) % 8)
                        places[name] = _CODE + len(memory)
                        memory += struct.pack("<Q", address)
                    address, kind_of_place = places[name], {_ADDRESS_PAGE: _ADR_PAGE, _ADDRESS_LOW: _LOAD_EIGHT}[kind_of_place]
                _relocate(memory, self._starts[info] + place, kind_of_place, address + addend)


def _linked(code: dict[str, bytes]) -> tuple[bytes, int]:
    """The objects of a kernel's units, by their symbols, in one piece, relocated to stand at ``_CODE``, and the address of its entry point."""
    memory = bytearray()
    objects = {symbol: _Object(content, memory) for symbol, content in code.items()}
    public = {}
    for symbol, placed in objects.items():
        (public[symbol],) = placed.public.values()
    for placed in objects.values():
        placed.relocate(memory, public)
    return bytes(memory), public[symbol]


def _relocate(memory: bytearray, place: int, kind: int, to: int) -> None:
    (word,) = struct.unpack_from("<I", memory, place - _CODE)
    if kind == _ADR_PAGE:
        pages = (to >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind == _ADD_LOW or kind in _LOAD_LOW:
        word |= ((to & 0xFFF) >> _LOAD_LOW.get(kind, 0)) << 10
    elif kind in (_JUMP, _CALL):
        word |= (to - place) >> 2 & 0x3FFFFFF
    else:
        raise NotImplementedError(f"relocation {kind}")
    struct.pack_into("<I", memory, place - _CODE, word)


def run_emulated(plan: Any, inputs: testing.Inputs) -> testing.Result:
    """The plan's result.  Raises UcError for an access outside of an operand's pages, AssertionError for a write in front of one."""
    problem = plan.problem
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(registers.UC_CPU_ARM64_MAX)

    def put(start: int, content: bytes) -> None:
        machine.mem_map(start, max(-(-len(content) // _PAGE), 1) * _PAGE)
        machine.mem_write(start, content)

    code, entry = _linked(plan.kernel.code)
    image, links, block = _image(plan.block, plan._tables)
    words = bytearray(image)
    for at, to in links:
        struct.pack_into("<q", words, at, _IMAGE + to)
    for start, content in ((_CODE, code), (_RETURN, b"\0"), (_STACK, bytes(_STACK_BYTES)), (_SCRATCH, b"\xff" * plan.workspace_bytes), (_IMAGE, bytes(words))):
        put(start, content)
    stated = harness.operands(problem, inputs)
    sizes = [0 if o is None else o.bytes(problem.dtype) for o in stated]
    addresses = []
    for i, (operand, size) in enumerate(zip(stated, sizes)):
        known = b"\xff" * size if operand is None or operand.tensor is None else _memory(operand.tensor)
        put(_OPERANDS + i * _SPACING, bytes([_CANARY]) * (-size % _PAGE) + known)
        addresses.append(_OPERANDS + i * _SPACING + -size % _PAGE if size else 0)
    for i, value in enumerate((_IMAGE + block, *addresses, _SCRATCH)):
        machine.reg_write(registers.UC_ARM64_REG_X0 + i, value)
    machine.reg_write(registers.UC_ARM64_REG_SP, _STACK + _STACK_BYTES)
    machine.reg_write(registers.UC_ARM64_REG_LR, _RETURN)
    machine.emu_start(entry, _RETURN)
    for i, size in enumerate(sizes):
        front = machine.mem_read(_OPERANDS + i * _SPACING, -size % _PAGE) if size else b""
        assert front == bytes([_CANARY]) * len(front), f"{plan.implementation} '{problem}': wrote in front of operand {i}"
    side, out = (bytes(machine.mem_read(addresses[i], sizes[i])) if sizes[i] else b"" for i in (2, 3))
    assert stated[3] is not None
    main = _tensor(out, problem.dtype).as_strided(stated[3].shape, stated[3].strides)
    return testing.Result(main, _tensor(side, problem.dtype) if side and problem.direction == "grad_weight" else None)


def _memory(tensor: torch.Tensor) -> bytes:
    return tensor.as_strided((tensor.numel(),), (1,)).clone().view(torch.uint8).numpy().tobytes()


def _tensor(content: bytes, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=testing.TORCH_DTYPES[dtype])
