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

__all__ = ["FEW", "MOST_SPREAD", "PLAIN", "Form", "Reads", "Roles", "out_tables", "table_pitch", "tile_starts"]

MOST_SPREAD = 64
"""The largest dilation: a strip of tiles that nchw transposes at once is that much longer."""

FEW = 4
"""Source channels at most that a layer with stride 2 is vectorised over all components of (four of them, one vector)."""

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """A kernel of r x s taps in parts, correlations with stride 1 and the same number of taps in rows and columns.

    With stride 2 the tap ``(2 i + a, 2 j + b)`` is the tap (i, j) of the part (a, b); taps beyond the kernel are zero.  Forward the parts are *components* of
    a sum: (a, b) reads every second row and column from ``a`` and ``b`` on, and the components' channels lie side by side, *virtual* channels of one
    algorithm.  In grad_input (``phased``) they are *phases*: all read the same, and each writes every second row and column.
    """

    r: int
    s: int
    stride: int = 1
    phased: bool = False

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of taps of a component."""
        return -(-self.r // self.stride), -(-self.s // self.stride)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The order makes those that are needed at a point neighbours: at infinity a part without the last tap is zero."""
        return ((0, 0),) if self.stride == 1 else ((1, 0), (0, 0), (0, 1), (1, 1))

    @property
    def components(self) -> tuple[tuple[int, int], ...]:
        """The parts that are summed up."""
        return ((0, 0),) if self.phased else self.parts

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """The parts that are results of their own."""
        return self.parts if self.phased else ((0, 0),)

    @property
    def step(self) -> int:
        """Rows and columns of the source from one output of a tile to the next."""
        return 1 if self.phased else self.stride

    def tap(self, part: tuple[int, int], i: int, j: int) -> int | None:
        """Index of a part's tap in the kernel, row by row."""
        row, column = self.stride * i + part[0], self.stride * j + part[1]
        return row * self.s + column if row < self.r and column < self.s else None

    @property
    def short(self) -> tuple[tuple[bool, bool], ...]:
        """For each part whether it lacks the last row, and the last column, of taps."""
        rows, columns = self.taps
        return tuple((self.stride * (rows - 1) + a >= self.r, self.stride * (columns - 1) + b >= self.s) for a, b in self.parts)

    def used(self, part: int, last_row: bool, last_column: bool) -> bool:
        """Whether the part is not zero at points of infinity in rows or columns."""
        row, column = self.short[part]
        return not (row and last_row) and not (column and last_column)

    def active(self, last_row: bool, last_column: bool) -> tuple[int, int]:
        """First part, and the one after the last, that is not zero at points of infinity in rows or columns."""
        found = [i for i in range(len(self.parts)) if self.used(i, last_row, last_column)]
        return found[0], found[-1] + 1


PLAIN = Form(3, 3)


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
        before = (top, left) if self.forward else (rows - 1 - top, columns - 1 - left)
        return (before[0] // 2, before[1] // 2) if self.form.phased else before

    @property
    def phase_shift(self) -> tuple[int, int]:
        """Of phases: the row and the column of x that output (0, 0) of the part (0, 0) is; those of the part (a, b) lie ``a`` and ``b`` before.

        Row h of the gradient of x reads row ``(h + u - before) / 2`` of that of y, for tap ``u`` of the turned kernel, where that is a whole number: output i
        of the part a is row ``2 i + before - a``.  The outputs begin at ``i = -(before // 2)``, from where on each part has all of its rows.
        """
        left, _, top, _ = self.problem.padding
        return (self.problem.r - 1 - top) % 2, (self.problem.s - 1 - left) % 2

    @property
    def padding_mode(self) -> str:
        return self.problem.padding_mode if self.forward else "zeros"

    @property
    def form(self) -> Form:
        stride = self.problem.stride[0]
        return Form(self.problem.r, self.problem.s, stride, stride > 1 and not self.forward)

    @property
    def virtual(self) -> int:
        """Channels of all components."""
        return self.source_channels * len(self.form.components)

    @property
    def few(self) -> bool:
        """Whether a vector holds the channels of all components."""
        return self.form.step == 2 and self.source_channels <= FEW

    @property
    def by_pieces(self) -> bool:
        """Whether V is made a piece of the reduction at a time: of several components it would not fit the caches."""
        return len(self.form.components) > 1 and not self.few

    @property
    def step(self) -> tuple[int, int]:
        """Source rows and columns from one entry of a tile to the next."""
        return self.form.step * self.spread[0], self.form.step * self.spread[1]

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
        rows, columns = (group * math.ceil(size / (spread * m)) for size, spread, group in zip(self.tiled_size, self.spread, self.groups))
        return rows, columns

    @property
    def tiled_size(self) -> tuple[int, int]:
        """Rows and columns of outputs that tiles cover; of every phase, where there are several."""
        if not self.form.phased:
            return self.out_size
        rows, columns = ((size - shift) // 2 + 1 for size, shift in zip(self.out_size, self.phase_shift))
        return rows, columns


def table_pitch(extent: int) -> int:
    """Entries from one tile's part of a table to the next: a vector is loaded at once."""
    return 1 << (extent - 1).bit_length()


def tile_starts(tiles: int, m: int, spread: int, group: int) -> Table:
    """The first output of each tile of an axis."""
    numbers = np.arange(tiles, dtype=np.int64)
    return numbers // group * (m * spread) + numbers % group


@dataclass(frozen=True)
class Reads:
    """What tiles read: ``extent`` rows and columns each, ``step`` apart, from ``stride`` times their first output less ``before`` on."""

    size: tuple[int, int]
    channels: int
    extent: int
    before: tuple[int, int]
    mode: str = "zeros"
    step: tuple[int, int] = (1, 1)
    stride: int = 1
    element: int = 4

    def tables(self, starts: tuple[Table, Table], nhwc: bool) -> tuple[Table, Table]:
        """Rows: for each of ``stride`` offsets and each tile ``table_pitch(extent)`` byte offsets, -1 for zero.  Columns for nhwc: likewise; for nchw: the
        column of every position of the padded image."""
        pixel = self.element * (self.channels if nhwc else 1)
        rows = self._reads(0, starts[0], self.size[1] * pixel)
        return rows, self._reads(1, starts[1], pixel) if nhwc else self.positions(starts[1], 1)

    def positions(self, starts: Table, pitch: int) -> Table:
        """The column of every position of the padded image, times ``pitch``, -1 for zero."""
        index = padded_index(np.arange(starts.max() * self.stride + self.extent * self.step[1], dtype=np.int64) - self.before[1], self.size[1], self.mode)
        return np.where(index >= 0, index * pitch, -1)

    def _reads(self, axis: int, starts: Table, pitch: int) -> Table:
        first = starts * self.stride + np.arange(self.stride, dtype=np.int64)[:, None]
        inner = np.arange(table_pitch(self.extent), dtype=np.int64) * self.step[axis] - self.before[axis]
        index = padded_index(first[:, :, None] + inner, self.size[axis], self.mode)
        return np.ascontiguousarray(np.where(index >= 0, index * pitch, -1))


def out_tables(roles: Roles, starts: tuple[Table, Table], m: int, element: int = 4) -> tuple[Table, Table]:
    """``table_pitch(m)`` entries for each tile: byte offsets of the m rows, and of the m columns, that it writes, -1 for those outside; of phases, all
    tiles of the first and then all of the second."""
    size, pixel = roles.out_size, element * (roles.out_channels if roles.problem.format == "nhwc" else 1)
    rows, columns = (s[:, None] + np.arange(table_pitch(m), dtype=np.int64) * step for s, step in zip(starts, roles.spread))
    if roles.form.phased:
        rows, columns = (np.concatenate([2 * places + shift - part for part in (0, 1)]) for places, shift in zip((rows, columns), roles.phase_shift))
    inside = [(places >= 0) & (places < limit) for places, limit in zip((rows, columns), size)]
    return np.where(inside[0], rows * (size[1] * pixel), -1), np.where(inside[1], columns * pixel, -1)
