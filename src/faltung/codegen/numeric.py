"""Element types in memory and in registers: float32 is computed in for the 16-bit types, float64 in itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .emit import Function, Value, vector_type

if TYPE_CHECKING:
    from ..cpu.target import Target

__all__ = ["Numeric"]

_MEMORY = {"f32": "float", "f64": "double", "bf16": "i16", "f16": "i16"}


@dataclass(frozen=True)
class Numeric:
    """Loads and stores of ``dtype`` (``f32 f64 bf16 f16``) that convert from and to the compute type (``float`` or ``double``)."""

    dtype: str
    target: Target

    @property
    def memory(self) -> str:
        """LLVM type of an element in memory."""
        return _MEMORY[self.dtype]

    @property
    def compute(self) -> str:
        """LLVM type of an element in a register."""
        return "double" if self.dtype == "f64" else "float"

    @property
    def memory_bytes(self) -> int:
        return {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}[self.dtype]

    @property
    def compute_bytes(self) -> int:
        return 8 if self.dtype == "f64" else 4

    @property
    def lanes(self) -> int:
        """Elements of the compute type in one vector."""
        return self.target.lanes(self.compute)

    @property
    def vector(self) -> str:
        return vector_type(self.compute, self.lanes)

    @property
    def converts(self) -> bool:
        return self.dtype in ("bf16", "f16")

    @property
    def pairs(self) -> bool:
        """Whether matrix-like algorithms multiply bfloat16 as it is, two terms of the reduction in one 32-bit element."""
        return self.dtype == "bf16" and self.target.bfloat16_dot

    def elements(self, terms: int) -> int:
        """Elements of the compute type's size that ``terms`` terms of a reduction take."""
        return -(-terms // 2) if self.pairs else terms

    def load(self, f: Function, pointer: Value, lanes: int, mask: Value | None = None) -> Value:
        """``lanes`` elements in the compute type; lanes outside the mask are zero."""
        type_ = vector_type(self.memory, lanes)
        if mask is None:
            raw = f.load(pointer, type_)
        elif self.target.masks or (self.target.vector_bytes >= 32 and not self.converts):
            raw = f.load_masked(pointer, mask, type_)
        else:  # lane by lane, in branches: most vectors are whole
            raw = f.choose(f.mask_count(mask) >= lanes, lambda: f.load(pointer, type_), lambda: f.load_masked(pointer, mask, type_))
        return self.widen(f, raw, lanes)

    def store(self, f: Function, value: Value, pointer: Value, lanes: int, mask: Value | None = None) -> None:
        raw = self.narrow(f, value, lanes)
        self.put(f, raw, pointer, lanes, mask)

    def put(self, f: Function, raw: Value, pointer: Value, lanes: int, mask: Value | None = None) -> None:
        """Store ``lanes`` elements of any type as they are."""
        if mask is None:
            f.store(raw, pointer)
        elif self.target.masks:
            f.store_masked(raw, pointer, mask)
        else:  # AVX2 has masked stores of 32 bits, of a dozen cycles; narrower ones go lane by lane
            f.branch(f.mask_count(mask) >= lanes, lambda: f.store(raw, pointer), lambda: f.store_masked(raw, pointer, mask))

    def widen(self, f: Function, raw: Value, lanes: int) -> Value:
        """From the memory type to the compute type (exact)."""
        if not self.converts:
            return raw
        wide = vector_type("i32", lanes)
        if self.dtype == "bf16":
            bits = f.integer("shl", f.cast("zext", raw, wide), _int_splat(f, 16, wide))
            return f.cast("bitcast", bits, vector_type("float", lanes))
        if self.target.half:
            return f.cast("fpext", f.cast("bitcast", raw, vector_type("half", lanes)), vector_type("float", lanes))
        return self._widen_half(f, raw, lanes, wide)

    def narrow(self, f: Function, value: Value, lanes: int) -> Value:
        """From the compute type to the memory type, to the nearest, ties to even; NaN stays NaN."""
        if not self.converts:
            return value
        short, wide = vector_type("i16", lanes), vector_type("i32", lanes)
        if self.dtype == "f16" and self.target.half:
            return f.cast("bitcast", f.cast("fptrunc", value, vector_type("half", lanes)), short)
        bits = f.cast("bitcast", value, wide)
        if self.dtype == "f16":
            return f.cast("trunc", self._narrow_half(f, bits, lanes, wide), short)
        odd = f.integer("and", f.integer("lshr", bits, _int_splat(f, 16, wide)), _int_splat(f, 1, wide))
        rounded = f.integer("add", f.integer("add", bits, _int_splat(f, 0x7FFF, wide)), odd)
        nan = f.define(vector_type("i1", lanes), f"fcmp uno {value}, {value.text}")
        quiet = f.integer("or", bits, _int_splat(f, 0x400000, wide))
        return f.cast("trunc", f.integer("lshr", f.select(nan, quiet, rounded), _int_splat(f, 16, wide)), short)

    def _widen_half(self, f: Function, raw: Value, lanes: int, wide: str) -> Value:
        """float16 to float32 without conversion instructions: shift into place, scale by 2**112, restore infinity and NaN."""
        bits = f.cast("zext", raw, wide)
        magnitude = f.integer("shl", f.integer("and", bits, _int_splat(f, 0x7FFF, wide)), _int_splat(f, 13, wide))
        type_ = vector_type("float", lanes)
        scaled = f.fmul(f.cast("bitcast", magnitude, type_), f.constant(2.0**112, type_))
        scaled_bits = f.cast("bitcast", scaled, wide)
        special = f.compare("uge", magnitude, _int_splat(f, 0x0F800000, wide))
        exponent = f.select(special, f.integer("or", magnitude, _int_splat(f, 0x7F800000, wide)), scaled_bits)
        sign = f.integer("shl", f.integer("and", bits, _int_splat(f, 0x8000, wide)), _int_splat(f, 16, wide))
        return f.cast("bitcast", f.integer("or", exponent, sign), type_)

    def _narrow_half(self, f: Function, bits: Value, lanes: int, wide: str) -> Value:
        """float32 bits to float16 bits in 32-bit lanes, to nearest even; subnormal results are rounded by an addition at 2**-24's place."""

        def number(value: int) -> Value:
            return _int_splat(f, value, wide)

        type_ = vector_type("float", lanes)
        sign = f.integer("and", bits, number(0x80000000))
        magnitude = f.integer("and", bits, number(0x7FFFFFFF))
        odd = f.integer("and", f.integer("lshr", magnitude, number(13)), number(1))
        normal = f.integer("add", f.integer("add", magnitude, number((15 - 127) * (1 << 23) + 0xFFF & 0xFFFFFFFF)), odd)
        normal = f.integer("lshr", normal, number(13))
        # 0.5 has a unit in the last place of 2**-24: adding it rounds the sum to float16's subnormal grid.
        tiny_sum = f.fadd(f.cast("bitcast", magnitude, type_), f.constant(0.5, type_))
        tiny = f.integer("sub", f.cast("bitcast", tiny_sum, wide), number(0x3F000000))
        finite = f.select(f.compare("ult", magnitude, number(0x38800000)), tiny, normal)
        overflow = f.select(f.compare("ugt", magnitude, number(0x7F800000)), number(0x7E00), number(0x7C00))
        result = f.select(f.compare("uge", magnitude, number(0x47800000)), overflow, finite)
        return f.integer("or", result, f.integer("lshr", sign, number(16)))


def _int_splat(f: Function, number: int, type_: str) -> Value:
    signed = number - (1 << 32) if number >= 1 << 31 else number
    return Value(f, f"splat (i32 {signed})" if type_.startswith("<") else str(signed), type_)
