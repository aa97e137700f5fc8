"""A convolution as Winograd's algorithm sees it: tiles of outputs, what each of them reads, and the tables that say so.

A dilated layer falls apart into residues: outputs ``e, e + d, e + 2 d, ...`` read inputs of one residue only, and are a correlation without dilation.
A *tile* is m x m outputs of one residue.  Tiles of neighbouring residues are neighbours: tile ``t`` of an axis starts at output
``t // group * m * spread + t % group``, where ``spread`` is the distance of a tile's outputs and ``group`` the number of residues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..problem import ConvProblem
from .geometry import padded_index

__all__ = ["MOST_SPREAD", "Roles", "out_tables", "source_tables", "table_pitch", "tile_starts"]

MOST_SPREAD = 64
"""The largest dilation: a strip of tiles that nchw transposes at once is that much longer."""

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Roles:
    """A problem as a correlation with stride 1: grad_input reads the gradient of y with the filters turned and their channels exchanged."""

    problem: ConvProblem

    @property
    def forward(self) -> bool:
        return self.problem.direction == "forward"

    @property
    def source_channels(self) -> int:
        return self.problem.c if self.forward else self.problem.k

    @property
    def out_channels(self) -> int:
        return self.problem.k if self.forward else self.problem.c

    @property
    def source_size(self) -> tuple[int, int]:
        return (self.problem.h, self.problem.w) if self.forward else (self.problem.p, self.problem.q)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.problem.p, self.problem.q) if self.forward else (self.problem.h, self.problem.w)

    @property
    def before(self) -> tuple[int, int]:
        """Padded rows above and columns left of the source."""
        left, _, top, _ = self.problem.padding
        rows, columns = self.problem.effective_kernel
        return (top, left) if self.forward else (rows - 1 - top, columns - 1 - left)

    @property
    def padding_mode(self) -> str:
        return self.problem.padding_mode if self.forward else "zeros"

    @property
    def spread(self) -> tuple[int, int]:
        """Rows and columns from one output of a tile to the next."""
        return self.problem.dilation

    @property
    def groups(self) -> tuple[int, int]:
        """Residues of rows and of columns."""
        return min(self.spread[0], self.out_size[0]), min(self.spread[1], self.out_size[1])

    def grid(self, m: int) -> tuple[int, int]:
        """Rows and columns of tiles of one image."""
        rows, columns = (group * math.ceil(size / (spread * m)) for size, spread, group in zip(self.out_size, self.spread, self.groups))
        return rows, columns


def table_pitch(extent: int) -> int:
    """Entries from one tile's part of a table to the next: a vector is loaded at once."""
    return 1 << (extent - 1).bit_length()


def tile_starts(tiles: int, m: int, spread: int, group: int) -> Table:
    """The first output of each tile of an axis."""
    numbers = np.arange(tiles, dtype=np.int64)
    return numbers // group * (m * spread) + numbers % group


def source_tables(
    size: tuple[int, int], channels: int, starts: tuple[Table, Table], extent: int, spread: tuple[int, int], before: tuple[int, int], mode: str, nhwc: bool
) -> tuple[Table, Table]:
    """What the tiles that start at ``starts`` read, ``extent`` rows and columns each, from a source of ``size``, ``before`` padded rows and columns.

    Rows: ``table_pitch(extent)`` byte offsets for each tile, -1 for zero.  Columns for nhwc: likewise; for nchw: the column of every position that is read.
    """
    width = size[1] * 4 * (channels if nhwc else 1)
    rows = _reads(starts[0], extent, spread[0], before[0], size[0], mode, width)
    if nhwc:
        return rows, _reads(starts[1], extent, spread[1], before[1], size[1], mode, 4 * channels)
    reach = np.arange(starts[1].max() + extent * spread[1], dtype=np.int64)
    return rows, padded_index(reach - before[1], size[1], mode)


def _reads(starts: Table, extent: int, spread: int, before: int, size: int, mode: str, pitch: int) -> Table:
    index = padded_index(starts[:, None] + np.arange(table_pitch(extent), dtype=np.int64) * spread - before, size, mode)
    return np.ascontiguousarray(np.where(index >= 0, index * pitch, -1))


def out_tables(size: tuple[int, int], channels: int, starts: tuple[Table, Table], m: int, spread: tuple[int, int], nhwc: bool) -> tuple[Table, Table]:
    """``table_pitch(m)`` entries for each tile: byte offsets of the m rows, and of the m columns, that it writes, -1 for those outside."""
    pixel = 4 * (channels if nhwc else 1)
    rows, columns = (s[:, None] + np.arange(table_pitch(m), dtype=np.int64) * step for s, step in zip(starts, spread))
    return np.where(rows < size[0], rows * (size[1] * pixel), -1), np.where(columns < size[1], columns * pixel, -1)
