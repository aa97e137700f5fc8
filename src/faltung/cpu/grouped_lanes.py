"""Vector lanes over several groups: which channel each lane reads, which taps share a loaded vector, and a tile's layout in scratch.

A vector holds ``per_vector`` whole groups of the channels that are produced, and each lane needs every source channel of its group in turn.  Two layouts:

* *interleaved*, where ``per_vector`` is a power of two: lane ``l`` is channel ``l // per_vector`` of group ``l % per_vector``.  Scratch holds a pixel's
  channels in the same order, so the channel that all lanes need next is ``per_vector`` neighbours, which one load repeats throughout a vector
  (``vbroadcastss``, ``vbroadcastsd``, ``vbroadcastf32x4``, ...: no shuffle, which on Intel's cores would take a multiply-add's port).
* otherwise lane ``l`` is channel ``l % out`` of group ``l // out``, and scratch holds *planes*: in plane ``h``, lane ``l`` is source channel
  ``h * unit + l % unit`` of the lane's group, so a broadcast within each run of ``unit`` lanes (one instruction, as a run lies within 16 bytes) gives channel
  ``h * unit + j`` of every lane's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..codegen.numeric import Numeric
from .geometry import Axis, Tap

__all__ = ["TILE_FIELDS", "Chunk", "Expansion", "GroupedTile", "Lanes", "chunks", "even"]

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


@dataclass(frozen=True)
class Lanes:
    """``lanes`` of a vector, ``out`` channels produced and ``source`` channels read by a group, ``groups`` of them.

    ``interleaved``: see above; ``unit`` is 1 then.  A group wider than a vector takes several, its ``parts``.
    """

    lanes: int
    out: int
    source: int
    groups: int
    unit: int
    interleaved: bool = False

    @classmethod
    def choose(cls, numeric: Numeric, out: int, source: int, groups: int) -> Lanes:
        """Interleaved lanes where they can be, else those with the longest runs that 16 bytes hold."""
        per_vector = max(1, numeric.lanes // out)
        if per_vector & (per_vector - 1) == 0:
            return cls(numeric.lanes, out, source, groups, 1, interleaved=True)
        unit = 16 // numeric.compute_bytes
        while out % unit or source % unit:
            unit //= 2
        return cls(numeric.lanes, out, source, groups, unit)

    @property
    def per_vector(self) -> int:
        """Groups of one vector, or of the parts of one group."""
        return max(1, self.lanes // self.out)

    @property
    def single(self) -> bool:
        """Whether a vector is one group, or a part of one, in order."""
        return self.interleaved and self.per_vector == 1

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
    def plane_channels(self) -> int:
        """Channels of a group in one plane."""
        return self.lanes // self.per_vector if self.interleaved else self.unit

    @property
    def planes(self) -> int:
        """Vectors of a pixel in scratch."""
        return -(-self.source // self.plane_channels)

    def steps(self, size: int) -> list[tuple[int, int]]:
        """Plane, and place in its vectors in bytes, of each step of a sum (``unit`` channels); ``size`` bytes an element."""
        step = self.per_vector * size if self.interleaved else 0
        return [(i // self.plane_channels, i % self.plane_channels * step) for i in range(0, self.source, self.unit)]

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

    @property
    def places(self) -> tuple[int, ...]:
        """The lane of each of a vector's results, in the order of memory."""
        if not self.interleaved:
            return tuple(range(self.width))
        return tuple(i % self.out * self.per_vector + i // self.out for i in range(self.width)) if self.per_vector > 1 else tuple(range(self.width))

    @property
    def order(self) -> tuple[int, ...]:
        """The result of each lane: the inverse of :attr:`places`; that of a lane without one is any."""
        found = [self.width - 1] * self.lanes
        for place, lane in enumerate(self.places):
            found[lane] = place
        return tuple(found)

    @property
    def in_order(self) -> bool:
        """Whether the lanes are in the order of memory."""
        return self.places == tuple(range(self.width))

    def expansion(self) -> Expansion:
        """How the source is packed."""
        if self.interleaved:
            channel = [lane // self.per_vector for lane in range(self.lanes)]
            picks = tuple(tuple(self._pick(h * self.plane_channels + c, lane % self.per_vector) for lane, c in enumerate(channel)) for h in range(self.planes))
        else:
            groups = [lane // self.out if lane < self.width else 0 for lane in range(self.lanes)]
            picks = tuple(tuple(g * self.source + h * self.unit + lane % self.unit for lane, g in enumerate(groups)) for h in range(self.planes))
        return Expansion(picks, -(-self.source_width // self.lanes), self.partial or self.source_width % self.lanes != 0)

    def _pick(self, channel: int, group: int) -> int:
        """Where a channel of a group lies in the source; for one behind the last, which nothing reads, any place (its own where that is in order)."""
        return channel if self.per_vector == 1 else group * self.source + min(channel, self.source - 1)

    def result_expansion(self) -> Expansion:
        """How the gradient of the result is packed: one plane."""
        return Expansion((tuple(range(self.lanes)) if self.in_order else self.order,), 1, self.masked)

    def broadcast(self, j: int) -> tuple[int, ...]:
        """The lanes of a plane that hold channel ``j`` of its run, for each lane."""
        return tuple(lane // self.unit * self.unit + j for lane in range(self.lanes))

    def repeated(self) -> tuple[int, ...]:
        """Of one channel of all groups, the group that each lane takes."""
        return tuple(lane % self.per_vector for lane in range(self.lanes))


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
