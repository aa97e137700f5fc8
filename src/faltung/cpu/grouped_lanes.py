"""Vector lanes over several groups: which channel each lane reads, which taps share a loaded vector, and a tile's layout in scratch.

A vector holds ``per_vector`` whole groups of the channels that are produced.  Lane ``l`` (group ``l // out``) needs every source channel ``i`` of
its group in turn.  Scratch holds *planes*: in plane ``h``, lane ``l`` is source channel ``h * unit + l % unit`` of the lane's group, so a
broadcast within each run of ``unit`` lanes (one instruction, as a run lies within 16 bytes) gives channel ``h * unit + j`` of every lane's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..codegen.numeric import Numeric
from .geometry import Axis, Tap

__all__ = ["TILE_FIELDS", "Chunk", "Expansion", "GroupedTile", "Lanes", "chunks", "even", "identity"]

TILE_FIELDS = (
    "channel", "column", "rows", "positions", "row_table", "slabs", "slab_table", "column_table", "plane", "row", "step",
    "first_column", "column_span", "columns", "pixels", "copy",
)  # fmt: skip
"""What packing a tile needs to know: byte pitches of the source's channels and columns; scratch rows and their positions in the table of source rows
(byte offsets, -1 for zero); column slabs, their facts and the table of source columns (-1 for zero); byte pitches of the tile's planes and rows; the
distance of the source columns that neighbouring outputs read; the first source column of the tile at output column 0, how many columns from there on a
tile spans, and how many there are; the image's pixels, and the place of its transposed copy behind the tile."""


@dataclass(frozen=True)
class Expansion:
    """How packing makes a pixel's planes: ``picks[h]`` are the source channels (counted from the vector's first) of plane ``h``'s lanes.

    ``loads``: vectors of source channels; ``masked``: the last of them is not whole everywhere.
    """

    picks: tuple[tuple[int, ...], ...]
    loads: int
    masked: bool

    @property
    def planes(self) -> int:
        return len(self.picks)


def identity(lanes: int, masked: bool) -> Expansion:
    """One plane, lane by lane."""
    return Expansion((tuple(range(lanes)),), 1, masked)


@dataclass(frozen=True)
class Lanes:
    """``lanes`` of a vector, ``out`` channels produced and ``source`` channels read by a group, ``groups`` of them.

    ``single``: a vector is one group, or one of several parts of one.  All its lanes then need the same source channel, which a broadcast of one element
    of memory gives without planes: scratch holds the source's vectors as they are (``unit`` is 1).
    """

    lanes: int
    out: int
    source: int
    groups: int
    unit: int
    single: bool = False

    @classmethod
    def choose(cls, numeric: Numeric, out: int, source: int, groups: int, gathers: bool = False) -> Lanes:
        """The lanes with the longest runs that 16 bytes hold.  ``gathers``: forward or grad_input, which can do with elements of memory."""
        if gathers and 2 * out > numeric.lanes:
            return cls(numeric.lanes, out, source, groups, 1, single=True)
        unit = 16 // numeric.compute_bytes
        while out % unit or source % unit:
            unit //= 2
        return cls(numeric.lanes, out, source, groups, unit)

    @property
    def per_vector(self) -> int:
        """Groups of one vector, or of the parts of one group."""
        return max(1, self.lanes // self.out)

    @property
    def parts(self) -> int:
        """Vectors that one group takes, where it is wider than one."""
        return max(1, -(-self.out // self.lanes))

    @property
    def vectors(self) -> int:
        return -(-self.groups // self.per_vector) * self.parts

    @property
    def width(self) -> int:
        """Lanes in use."""
        return min(self.per_vector * self.out, self.lanes)

    @property
    def source_width(self) -> int:
        """Source channels of one vector's groups."""
        return self.per_vector * self.source

    @property
    def planes(self) -> int:
        """Vectors of a pixel in scratch."""
        return -(-self.source // self.lanes) if self.single else self.source // self.unit

    def steps(self, size: int) -> list[tuple[int, int]]:
        """Plane, and place in its vectors in bytes, of each step of a sum; ``size`` bytes an element."""
        if self.single:
            return [(i // self.lanes, i % self.lanes * size) for i in range(self.source)]
        return [(h, 0) for h in range(self.planes)]

    @property
    def partial(self) -> bool:
        """Whether the last vector has fewer groups."""
        return self.groups % self.per_vector != 0

    @property
    def masked(self) -> bool:
        """Whether some vector of the result is not whole."""
        return self.partial or self.width < self.lanes

    @property
    def efficiency(self) -> float:
        """Share of lanes in use."""
        return self.groups * self.out / (self.vectors * self.lanes)

    def expansion(self) -> Expansion:
        if self.single:
            whole = tuple(tuple(h * self.lanes + lane for lane in range(self.lanes)) for h in range(self.planes))
            return Expansion(whole, self.planes, self.source % self.lanes != 0)
        groups = [lane // self.out if lane < self.width else 0 for lane in range(self.lanes)]
        picks = tuple(tuple(g * self.source + h * self.unit + lane % self.unit for lane, g in enumerate(groups)) for h in range(self.planes))
        return Expansion(picks, -(-self.source_width // self.lanes), self.partial or self.source_width % self.lanes != 0)

    def broadcast(self, j: int) -> tuple[int, ...]:
        """The lanes of a plane that hold channel ``j`` of its run, for each lane."""
        return tuple(lane // self.unit * self.unit + j for lane in range(self.lanes))


def even(total: int, most: int) -> list[int]:
    """``total`` in the fewest pieces of at most ``most``, as even as possible, the larger ones first."""
    pieces = -(-total // most)
    return [total // pieces + (1 if i < total % pieces else 0) for i in range(pieces)]


@dataclass(frozen=True)
class Chunk:
    """Column taps that share loads: ``shape`` are their shifts relative to ``shift`` in ``slab``; ``kernel``: their indices in the kernel."""

    shape: tuple[int, ...]
    slab: int
    shift: int
    kernel: tuple[int, ...]


def chunks(taps: Sequence[Tap], most: int) -> list[Chunk]:
    """The taps in chunks of at most ``most``, each within one slab."""
    found = []
    for slab in sorted({tap.slab for tap in taps}):
        mine = sorted((tap for tap in taps if tap.slab == slab), key=lambda tap: tap.shift)
        for size in even(len(mine), most):
            part, mine = mine[:size], mine[size:]
            first = part[0].shift
            found.append(Chunk(tuple(tap.shift - first for tap in part), slab, first, tuple(tap.kernel_index for tap in part)))
    return found


class GroupedTile:
    """A tile in scratch, ``[column slab][plane][row][column][lanes]``; ``slab plane row`` are byte pitches, ``bytes`` its size.

    ``source``: the gathered operand's byte pitches (image, channel, row, column); ``vector`` the bytes of a vector.  ``copied``: vectors of channels of the
    transposed copy of the image that lies behind the tile, 0 where there is none.
    """

    def __init__(self, rows: Axis, columns: Axis, planes: int, vector: int, source: tuple[int, int, int, int], copied: int = 0) -> None:
        self._rows, self._columns, self._source = rows, columns, source
        self.vector = vector
        self.row = (columns.tile + max((s.extent for s in columns.slabs), default=0)) * vector
        self.plane = rows.scratch_starts[-1] * self.row
        self.slab = planes * self.plane
        self.copy = len(columns.slabs) * self.slab
        self.pixels = rows.size * columns.size
        # A block of fewer pixels than lanes is written whole: as many entries of slack.
        self.bytes = self.copy + copied * (self.pixels + 64) * vector
        self.row_table = np.where(rows.table >= 0, rows.table * source[2], -1)
        self.slab_table = np.array(
            [(columns.table_start(i), i * self.slab, columns.tile + slab.extent, *columns.interior(i), slab.offset) for i, slab in enumerate(columns.slabs)],
            dtype=np.int64,
        )
        self.tables: list[npt.NDArray[np.generic]] = [self.row_table, rows.table_positions, columns.table, self.slab_table]

    def offset(self, row: Tap, chunk: Chunk, plane: int) -> int:
        """Byte offset of a chunk's first read for the tile's first output."""
        scratch_row = self._rows.scratch_starts[row.slab] + row.shift
        return chunk.slab * self.slab + plane * self.plane + scratch_row * self.row + chunk.shift * self.vector

    def arguments(self, prefix: str) -> dict[str, int]:
        """Values for :data:`TILE_FIELDS`."""
        rows, columns = self._rows, self._columns
        first = min((slab.offset for slab in columns.slabs), default=0)
        last = max((slab.offset + (columns.tile + slab.extent - 1) * columns.step + 1 for slab in columns.slabs), default=0)
        values = (
            self._source[1], self._source[3], rows.scratch_starts[-1], rows.table_positions.ctypes.data, self.row_table.ctypes.data, len(columns.slabs),
            self.slab_table.ctypes.data, columns.table.ctypes.data, self.plane, self.row, columns.step, first, last - first, columns.size,
            self.pixels, self.copy,
        )  # fmt: skip
        return {prefix + name: value for name, value in zip(TILE_FIELDS, values, strict=True)}
