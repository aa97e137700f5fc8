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
    """A kernel of r x s taps as a sum of components, correlations with stride 1 and the same number of taps in rows and columns.

    With stride 2 the tap ``(2 i + a, 2 j + b)`` is the tap (i, j) of the component (a, b), which reads every second row and column from ``a`` and ``b`` on;
    taps beyond the kernel are zero.  The components' channels lie side by side: *virtual* channels of one algorithm.
    """

    r: int
    s: int
    stride: int = 1

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of taps of a component."""
        return -(-self.r // self.stride), -(-self.s // self.stride)

    @property
    def components(self) -> tuple[tuple[int, int], ...]:
        """The order makes those that are needed at a point neighbours: at infinity a component without the last tap is zero."""
        return ((0, 0),) if self.stride == 1 else ((1, 0), (0, 0), (0, 1), (1, 1))

    def tap(self, component: tuple[int, int], i: int, j: int) -> int | None:
        """Index of a component's tap in the kernel, row by row."""
        row, column = self.stride * i + component[0], self.stride * j + component[1]
        return row * self.s + column if row < self.r and column < self.s else None

    @property
    def short(self) -> tuple[tuple[bool, bool], ...]:
        """For each component whether it lacks the last row, and the last column, of taps."""
        rows, columns = self.taps
        return tuple((self.stride * (rows - 1) + a >= self.r, self.stride * (columns - 1) + b >= self.s) for a, b in self.components)

    def active(self, last_row: bool, last_column: bool) -> tuple[int, int]:
        """First component, and the one after the last, that is not zero at points of infinity in rows or columns."""
        found = [i for i, (row, column) in enumerate(self.short) if not (row and last_row) and not (column and last_column)]
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
        return (top, left) if self.forward else (rows - 1 - top, columns - 1 - left)

    @property
    def padding_mode(self) -> str:
        return self.problem.padding_mode if self.forward else "zeros"

    @property
    def form(self) -> Form:
        return Form(self.problem.r, self.problem.s, self.problem.stride[0])

    @property
    def virtual(self) -> int:
        """Channels of all components."""
        return self.source_channels * len(self.form.components)

    @property
    def few(self) -> bool:
        """Whether a vector holds the channels of all components."""
        return self.form.stride == 2 and self.source_channels <= FEW

    @property
    def by_pieces(self) -> bool:
        """Whether V is made a piece of the reduction at a time: of several components it would not fit the caches."""
        return len(self.form.components) > 1 and not self.few

    @property
    def step(self) -> tuple[int, int]:
        """Source rows and columns from one entry of a tile to the next."""
        return self.form.stride * self.spread[0], self.form.stride * self.spread[1]

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


def out_tables(
    size: tuple[int, int], channels: int, starts: tuple[Table, Table], m: int, spread: tuple[int, int], nhwc: bool, element: int = 4
) -> tuple[Table, Table]:
    """``table_pitch(m)`` entries for each tile: byte offsets of the m rows, and of the m columns, that it writes, -1 for those outside."""
    pixel = element * (channels if nhwc else 1)
    rows, columns = (s[:, None] + np.arange(table_pitch(m), dtype=np.int64) * step for s, step in zip(starts, spread))
    return np.where(rows < size[0], rows * (size[1] * pixel), -1), np.where(columns < size[1], columns * pixel, -1)
