"""A packed tile of the gathered operand: its layout in scratch and the tables that packing reads.  See :mod:`faltung.cpu.pack`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..problem import DTYPES, ConvProblem
from .geometry import Axis, Tap

__all__ = ["PAGE", "Tile", "align", "block_room", "meets_itself", "odd_lines", "pitches", "row_pitch", "weight_strides"]


PAGE = 4096
"""Bytes of a page, and of one way of the first-level cache: addresses this far apart fall into one set."""


def align(value: int, to: int = 64) -> int:
    """``value`` rounded up to a multiple of ``to``."""
    return -(-value // to) * to


def odd_lines(value: int) -> int:
    """``value`` rounded up to an odd number of cache lines: what lies this far apart falls into different cache sets."""
    return (-(-value // 64) | 1) * 64


def pitches(problem: ConvProblem, input_side: bool) -> tuple[int, int, int, int]:
    """Byte pitches (image, channel, row, column) of x and its gradient, or of y and its gradient."""
    channels, height, width = (problem.c, problem.h, problem.w) if input_side else (problem.k, problem.p, problem.q)
    memory = DTYPES[problem.dtype]
    if problem.format == "nchw":
        return channels * height * width * memory, height * width * memory, width * memory, memory
    return channels * height * width * memory, memory, width * channels * memory, channels * memory


def weight_strides(problem: ConvProblem) -> tuple[int, int, int, int]:
    """Byte strides of the weight's output channel, input channel, row and column."""
    _, c, r, s = problem.weight_shape
    memory = DTYPES[problem.dtype]
    if problem.weight_format == "nchw":
        return c * r * s * memory, r * s * memory, s * memory, memory
    return r * s * c * memory, memory, s * c * memory, c * memory


def meets_itself(pitch: int) -> bool:
    """Whether pixels this many bytes apart fall into one set of the first-level cache, which holds a dozen lines of them and a block needs as many:
    1x1 layers with 1024 channels take up to 40 % more time so."""
    return pitch % PAGE == 0


def block_room(rows: int) -> int:
    """Elements of a channel's piece in the ``blocked`` layout: those of one or two vectors that are moved at once."""
    return max(4, 1 << (rows - 1).bit_length())


def row_pitch(columns: Axis) -> int:
    """Columns of one row of the ``outer`` layout."""
    return columns.entries(columns.tile) + max((s.extent for s in columns.slabs), default=0)


class Tile:
    """The tile of ``channels`` channels for two axes; ``row column channel slab`` are its byte pitches, ``bytes`` its size, ``pixel`` the
    distance of neighbouring outputs' reads.

    ``source`` are the gathered operand's byte pitches (image, channel, row, column), ``size`` the bytes of the compute type.  ``packed``: the tile
    is a copy, whose pitches can be chosen.  ``blocked`` is for one row: pieces of ``block`` columns, each a run of its own with all channels.  In ``linear``
    a pixel's channels are neighbours, and outputs that are neighbours in a column read pixels a row's pitch apart: a run of pixels may go on in the next row.
    """

    def __init__(
        self, rows: Axis, columns: Axis, layout: str, channels: int, size: int, source: tuple[int, int, int, int], packed: bool = True, block: int = 0
    ) -> None:
        self._rows, self._columns, self._source = rows, columns, source
        self.inner = layout == "inner"
        self.pixels = row_pitch(columns)
        scratch_rows = rows.scratch_starts[-1]
        if self.inner:
            self.channel, self.column, self.slab = size, channels * size, 0
            if packed and meets_itself(self.column * columns.advance):
                self.column += 64
            self.row = columns.scratch_starts[-1] * self.column
            self.bytes = scratch_rows * self.row
        elif layout == "linear":
            self.channel, self.column = size, channels * size
            if packed and self.column % 256 == 0:  # a matrix tile's rows would fall into few cache sets
                self.column = odd_lines(self.column)
            self.row = align(self.pixels, columns.advance) * self.column
            self.slab = scratch_rows * self.row
            self.bytes = len(columns.slabs) * self.slab
        elif layout == "blocked":
            self.column, self.slab, self.channel = size, 0, block_room(block) * size
            self.row = odd_lines(channels * self.channel)
            self.bytes = -(-columns.tile // block) * self.row
        else:
            self.column = size
            self.row = self.pixels * size
            self.slab = scratch_rows * self.row
            self.channel = len(columns.slabs) * self.slab
            self.bytes = channels * self.channel
        self.pixel = self.column * columns.advance
        self.row_table = np.where(rows.table >= 0, rows.table * source[2], -1)
        starts = columns.scratch_starts
        length = columns.entries(columns.tile)
        self.slab_table = np.array(
            [
                (columns.table_start(i), starts[i] if self.inner else i * self.slab, length + slab.extent, *columns.interior(i), slab.offset)
                for i, slab in enumerate(columns.slabs)
            ],
            dtype=np.int64,
        )
        self.zeros = np.zeros(64, np.float64)
        self.tables: list[npt.NDArray[np.generic]] = [self.row_table, rows.table_positions, columns.table, self.slab_table, self.zeros]

    def offset(self, row: Tap, column: Tap) -> int:
        """Byte offset of a tap's first read, channel 0."""
        row_at = (self._rows.scratch_starts[row.slab] + row.shift) * self.row
        if self.inner:
            return row_at + (self._columns.scratch_starts[column.slab] + column.shift) * self.column
        return row_at + column.slab * self.slab + column.shift * self.column

    def arguments(self) -> dict[str, int]:
        """Values for :data:`faltung.cpu.pack.TILE_ARGUMENTS`."""
        rows, columns = self._rows, self._columns
        return {
            "source_channel": self._source[1], "source_column": self._source[3], "source_step": columns.step, "rows": rows.scratch_starts[-1],
            "row_positions": rows.table_positions.ctypes.data, "row_table": self.row_table.ctypes.data, "slabs": len(columns.slabs),
            "slab_table": self.slab_table.ctypes.data, "column_table": columns.table.ctypes.data, "tile_channel": self.channel,
            "tile_row": self.row, "tile_column": self.column, "zeros": self.zeros.ctypes.data,
        }  # fmt: skip
