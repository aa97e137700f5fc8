"""The micro-kernel that every matrix-like algorithm runs on: a block of accumulators, one gathered operand, one packed panel.

For ``t`` in ``0 .. count - 1``, rows ``m`` and vectors ``v``::

    channels:  acc[m][v] += broadcast(source[table[t] + m * pitch]) * panel[t][v]      vectors run over channels
    pixels:    acc[m][v] += broadcast(panel[t][m]) * source[table[t] + v * lanes]      vectors run over pixels

Elements are of the compute type, or pairs of bfloat16 of which both products are added (see :mod:`faltung.cpu.bfloat`).
The table of byte offsets makes one kernel serve every kernel size, stride, dilation and memory format.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .bfloat import Rounded, dot

__all__ = ["Micro", "Pitches", "call_micro", "emit_micro", "largest_rows"]

_UNROLL = 2


@dataclass(frozen=True)
class Micro:
    """``rows`` x ``vectors`` accumulators; ``orientation`` is ``channels`` or ``pixels``; ``unit_pitch``: rows of the gathered operand
    are neighbours in memory; ``masked``: only the first ``lanes_last`` lanes of the last vector are loaded and stored in C; ``rounded``: C is bfloat16;
    ``ahead``: each step asks the second-level cache for one cache line, the step's of those at ``ahead``; ``across``: rows that many
    apart are neighbours in memory, and as many have places of their own.  With vectors over pixels, ``run``: those of a
    term follow those of the term before, so no table is read; ``apart``: rows of the panel are ``pitch`` bytes apart and their terms neighbours."""

    orientation: str
    rows: int
    vectors: int
    unit_pitch: bool = False
    masked: bool = False
    rounded: bool = False
    ahead: bool = False
    across: int = 0
    run: bool = False
    apart: bool = False

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("umbarp", (self.unit_pitch, self.masked, self.rounded, self.ahead, self.run, self.apart)) if set_)
        return f"micro_{self.orientation}_{self.rows}x{self.vectors}{flags}{self.across or ''}"


def largest_rows(vectors: int, registers: int, fma: bool) -> int:
    """Most rows whose accumulators, ``vectors`` panel vectors and one broadcast fit the registers (one more where a product needs its own)."""
    return min(14, (registers - vectors - (1 if fma else 2)) // vectors)


_LINE = 64  # bytes
_PARAMETERS = [
    ("ptr", "source"), ("ptr", "panel"), ("ptr", "c"), ("ptr", "init"), ("ptr", "table"), ("ptr", "ahead"),
    ("i64", "count"), ("i64", "pitch"), ("i64", "c_pitch"), ("i64", "init_pitch"), ("i64", "lanes_last"),
]  # fmt: skip


def call_micro(f: Function, micro: Function, **arguments: Value) -> None:
    """Call with arguments by name: ``source panel c init table count pitch c_pitch init_pitch lanes_last``, and ``ahead`` where the kernel uses it."""
    arguments.setdefault("ahead", arguments["panel"])
    f.call(micro, [arguments[name] for _, name in _PARAMETERS])


class Pitches:
    """One, two and three times a pitch of rows, made once."""

    def __init__(self, pitch: Value) -> None:
        self._one, self._two, self._three = pitch, pitch * 2, pitch * 3

    def rows(self, base: Value, count: int) -> list[Value]:
        """Pointers to ``count`` rows: every third has one of its own, the two behind it are reached by address modes from there."""
        pointers = []
        for m in range(count):
            if m and m % 3 == 0:
                base = base + self._three
            pointers.append(base if m % 3 == 0 else base + (self._one if m % 3 == 1 else self._two))
        return pointers


def emit_micro(module: Module, numeric: Numeric, micro: Micro) -> Function:
    """The micro-kernel as a function of the module (once).

    ``init`` is added to the sums at the end, row ``m`` at ``init + m * init_pitch``: C itself to accumulate, a vector of bias or of zeros
    with pitch 0.  Each call sums from zero, so a reduction in pieces has the smaller rounding error of a sum of sums.  Pitches and table
    entries count bytes.
    """
    if module.has(micro.name):
        return module._functions[micro.name]
    f = module.function(micro.name, _PARAMETERS)
    size, lanes, fused = numeric.compute_bytes, numeric.lanes, numeric.target.fma
    vector_bytes = lanes * size
    mask = f.lane_mask(f["lanes_last"], lanes) if micro.masked else None

    def block_mask(v: int) -> Value | None:
        return mask if v == micro.vectors - 1 else None

    def read(pointer: Value, v: int) -> Value:
        chosen = block_mask(v)
        return f.load(pointer + v * vector_bytes, numeric.vector) if chosen is None else f.load_masked(pointer + v * vector_bytes, chosen, numeric.vector)

    start = [f.zero(numeric.vector)] * (micro.rows * micro.vectors)
    gathers_rows = micro.orientation == "channels"
    pitches = Pitches(f["pitch"]) if micro.apart or (gathers_rows and not micro.unit_pitch) else None

    def step(index: Value, panel: Value, unroll: int, accumulators: list[Value]) -> list[Value]:
        gathered = f["source"] + (index * (micro.vectors * vector_bytes) if micro.run else f.load_index(f["table"], index))
        if micro.ahead:
            f.prefetch(f["ahead"] + index * _LINE, 2)
        result = list(accumulators)
        if gathers_rows:
            vectors = [f.load(panel + (unroll * micro.vectors + v) * vector_bytes, numeric.vector) for v in range(micro.vectors)]
            if pitches is None:
                scalars = [gathered + m * size for m in range(micro.rows)]
            elif micro.across:
                starts = pitches.rows(gathered, micro.across)
                scalars = [starts[m % micro.across] + m // micro.across * size for m in range(micro.rows)]
            else:
                scalars = pitches.rows(gathered, micro.rows)
        else:
            vectors = [f.load(gathered + v * vector_bytes, numeric.vector) for v in range(micro.vectors)]
            if pitches:
                # Opaque, or every third row gets a pointer that is carried from step to step, which leaves so few registers for addresses that blocks of eight
                # rows and more keep accumulators on the stack: 9x3 and 13x2 took twice the time of 6x4.
                scalars = pitches.rows(f.opaque(panel + unroll * size), micro.rows)
            else:
                scalars = [panel + (unroll * micro.rows + m) * size for m in range(micro.rows)]
        for m in range(micro.rows):
            scalar = f.splat(f.load(scalars[m], numeric.compute), lanes)
            for v in range(micro.vectors):
                i = m * micro.vectors + v
                result[i] = dot(f, scalar, vectors[v], result[i]) if numeric.pairs else f.fma(scalar, vectors[v], result[i], fused)
        return result

    stride = micro.vectors * vector_bytes if gathers_rows else size if micro.apart else micro.rows * size

    def turn(unroll: int):  # type: ignore[no-untyped-def]
        def body(index: Value, panel: Value, *accumulators: Value) -> list[Value]:
            values = list(accumulators)
            for u in range(unroll):
                values = step(index + u, panel, u, values)
            return [panel + unroll * stride, *values]

        return body

    whole = f.integer("and", f["count"], -_UNROLL)
    panel, *values = f.loop(0, whole, _UNROLL, turn(_UNROLL), [f["panel"], *start])
    _, *values = f.loop(whole, f["count"], 1, turn(1), [panel, *values])
    for m, (pointer, first) in enumerate(zip(Pitches(f["c_pitch"]).rows(f["c"], micro.rows), Pitches(f["init_pitch"]).rows(f["init"], micro.rows))):
        for v in range(micro.vectors):
            value, chosen = f.fadd(values[m * micro.vectors + v], read(first, v)), block_mask(v)
            if micro.rounded:
                Rounded(numeric.dtype, numeric.target).store(f, value, pointer + v * lanes * numeric.memory_bytes, lanes, chosen)
            elif chosen is None:
                f.store(value, pointer + v * vector_bytes)
            else:
                f.store_masked(value, pointer + v * vector_bytes, chosen)
    f.ret()
    return f
