"""Index arithmetic of a convolution along one axis, as tables: which source row (or column) every scratch row of a tile holds.

All three directions gather.  At output index ``i`` a tap reads source index ``i * step + offset``: ``forward`` and ``grad_weight`` step by
the stride through x; ``grad_input`` steps by one through the gradient of y, separately for each phase ``i mod stride`` of its output.
Source indices outside the image are mapped by the padding mode or marked -1 for zero, so no padded copy is ever made.
A tile's scratch holds *slabs*: runs of source indices ``step`` apart, shared by the taps that fall on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from ..problem import ConvProblem

__all__ = ["Axis", "Phase", "Slab", "Tap", "axes", "multiplications", "padded_index"]


@dataclass(frozen=True)
class Tap:
    """One kernel row (or column) of a phase: its index in the kernel, and where it reads (``slab`` and ``shift`` within it)."""

    kernel_index: int
    slab: int
    shift: int


@dataclass(frozen=True)
class Phase:
    """Outputs ``start, start + step, ...`` (``count`` of them) and the taps that reach them."""

    start: int
    count: int
    taps: tuple[Tap, ...]


@dataclass(frozen=True)
class Slab:
    """Source indices ``j * step + offset`` for entries ``j`` in ``0 .. (tile - 1) * advance + extent``."""

    offset: int
    extent: int


@dataclass(frozen=True)
class Axis:
    """One axis of a gather: ``size`` source indices, ``step`` between entries' reads, and the phases of the output.

    Neighbouring outputs are ``advance`` entries apart: 1 where slabs hold every ``step``-th source index, the stride in a *dense* axis,
    whose slabs hold all of them (``step`` 1) and so are plain runs of memory.

    ``count`` is the largest count of any phase: tiles of ``tile`` cover ``0 .. count - 1``.  ``output_step`` is the distance of a phase's outputs.
    """

    size: int
    step: int
    count: int
    tile: int
    output_step: int
    padding_mode: str
    slabs: tuple[Slab, ...]
    phases: tuple[Phase, ...]
    advance: int = 1

    def entries(self, outputs: int) -> int:
        """Entries of a slab without extent for a run of ``outputs``."""
        return max(0, outputs - 1) * self.advance + 1

    @property
    def covered(self) -> int:
        """Outputs that whole tiles cover, at least ``count``: tables reach as far, so that the last tile needs no cutting."""
        return -(-self.count // self.tile) * self.tile

    @cached_property
    def table(self) -> npt.NDArray[np.int64]:
        """Source index, or -1 for zero, of every slab's entries, one slab after the other; see :meth:`table_start`."""
        parts = []
        for slab in self.slabs:
            index = np.arange(self.entries(self.covered) + slab.extent, dtype=np.int64) * self.step + slab.offset
            parts.append(padded_index(index, self.size, self.padding_mode))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def table_start(self, slab: int) -> int:
        """Where the slab's part of :attr:`table` begins."""
        return sum(self.entries(self.covered) + s.extent for s in self.slabs[:slab])

    def interior(self, slab: int) -> tuple[int, int]:
        """The range of entries of a slab whose source index lies inside the image (there it is ``j * step + offset``)."""
        length = self.entries(self.covered) + self.slabs[slab].extent
        offset = self.slabs[slab].offset
        first = max(0, -(offset // self.step))
        last = (self.size - 1 - offset) // self.step + 1
        return min(first, length), max(min(first, length), min(last, length))

    @cached_property
    def scratch_starts(self) -> tuple[int, ...]:
        """Scratch index at which each slab of a tile begins, and behind the last one their total."""
        starts = [0]
        for slab in self.slabs:
            starts.append(starts[-1] + self.entries(self.tile) + slab.extent)
        return tuple(starts)

    @cached_property
    def table_positions(self) -> npt.NDArray[np.int64]:
        """For each scratch index of a tile: the position in :attr:`table` of its entry, for the tile that starts at output 0."""
        parts = [np.arange(self.entries(self.tile) + slab.extent, dtype=np.int64) + self.table_start(i) for i, slab in enumerate(self.slabs)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def padded_index(index: npt.NDArray[np.int64], size: int, mode: str) -> npt.NDArray[np.int64]:
    """Source index for positions in the padded image, -1 where the padding is zero; the rules of ``torch.nn.functional.pad``."""
    inside = (index >= 0) & (index < size)
    if mode == "zeros" or size == 0:
        return np.where(inside, index, -1)
    if mode == "replicate":
        return np.clip(index, 0, size - 1)
    if mode == "circular":
        return index % size
    period = max(1, 2 * (size - 1))
    folded = index % period
    return np.where(folded < size, folded, period - folded)


def axes(problem: ConvProblem, tile: tuple[int, int], *, dense: bool = False) -> tuple[Axis, Axis]:
    """Rows and columns of the gather that ``problem`` is, for tiles of ``tile`` outputs (of each phase).

    ``dense``: the columns' axis is dense where that copies no columns in vain (see :class:`Axis`).
    ``grad_input`` ignores the padding mode: for a mode other than zeros it is asked for the gradient of the padded input.
    """
    left, _, top, _ = problem.padding
    rows = (problem.h, problem.p, problem.r, problem.stride[0], problem.dilation[0], top)
    columns = (problem.w, problem.q, problem.s, problem.stride[1], problem.dilation[1], left)
    mode = problem.padding_mode
    if problem.direction == "grad_input":
        return _grad_input_axis(*rows, tile[0]), _grad_input_axis(*columns, tile[1])
    residues = {tap * problem.dilation[1] % problem.stride[1] for tap in range(problem.s)}
    return _forward_axis(*rows, mode, tile[0]), _forward_axis(*columns, mode, tile[1], dense and len(residues) == problem.stride[1])


def _forward_axis(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int, mode: str, tile: int, dense: bool = False) -> Axis:
    step, advance = (1, stride) if dense else (stride, 1)
    slabs, taps = _forward_taps(kernel, dilation, before, step, min(tile * advance, dilation * kernel))
    return Axis(size, step, outputs, tile, 1, mode, slabs, (Phase(0, outputs, taps),), advance)


@lru_cache(maxsize=1024)
def _forward_taps(kernel: int, dilation: int, before: int, step: int, longest: int) -> tuple[tuple[Slab, ...], tuple[Tap, ...]]:
    offsets = [tap * dilation - before for tap in range(kernel)]
    slabs, placed = _slabs(offsets, step, longest)
    return slabs, tuple(Tap(i, *placed[offset]) for i, offset in enumerate(offsets))


def _grad_input_axis(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int, tile: int) -> Axis:
    """Input index ``h = start + i * stride`` is reached by tap ``t`` from output ``(h + before - t * dilation) / stride``, where whole."""
    slabs, phases = _grad_input_phases(size, kernel, stride, dilation, before, min(tile, dilation * kernel))
    return Axis(outputs, 1, max((p.count for p in phases), default=0), tile, stride, "zeros", slabs, phases)


@lru_cache(maxsize=1024)
def _grad_input_phases(size: int, kernel: int, stride: int, dilation: int, before: int, longest: int) -> tuple[tuple[Slab, ...], tuple[Phase, ...]]:
    found: list[list[tuple[int, int]]] = []
    for start in range(min(stride, size)):
        whole = [t for t in range(kernel) if (start + before - t * dilation) % stride == 0]
        found.append([(t, (start + before - t * dilation) // stride) for t in whole])
    slabs, placed = _slabs(sorted({offset for taps in found for _, offset in taps}), 1, longest)
    phases = tuple(
        Phase(start, (size - start + stride - 1) // stride, tuple(Tap(t, *placed[offset]) for t, offset in taps)) for start, taps in enumerate(found)
    )
    return slabs, phases


def _slabs(offsets: list[int], step: int, tile: int) -> tuple[tuple[Slab, ...], dict[int, tuple[int, int]]]:
    """Slabs that hold every offset's reads, and the (slab, shift) of each offset.  Tiles longer than every gap give the same slabs.

    Offsets that differ by multiples of ``step`` can share a slab; they do where the shared slab is no longer than separate ones.
    """
    slabs: list[Slab] = []
    placed: dict[int, tuple[int, int]] = {}
    for residue in sorted({offset % step for offset in offsets}):
        family = sorted({offset for offset in offsets if offset % step == residue})
        runs = [[family[0]]]
        for offset in family[1:]:
            # A gap of more than a tile costs more to copy than a slab of its own.
            if (offset - runs[-1][-1]) // step > tile:
                runs.append([])
            runs[-1].append(offset)
        for run in runs:
            for offset in run:
                placed[offset] = (len(slabs), (offset - run[0]) // step)
            slabs.append(Slab(run[0], (run[-1] - run[0]) // step))
    return tuple(slabs), placed


def multiplications(problem: ConvProblem) -> int:
    """Multiply-adds of the direct algorithm; taps in zero padding are none."""
    if problem.padding_mode != "zeros":
        return problem.flops() // 2
    left, _, top, _ = problem.padding
    rows = _taps_inside(problem.h, problem.p, problem.r, problem.stride[0], problem.dilation[0], top)
    columns = _taps_inside(problem.w, problem.q, problem.s, problem.stride[1], problem.dilation[1], left)
    return problem.n * problem.k * problem.cg * rows * columns


def _taps_inside(size: int, outputs: int, taps: int, stride: int, dilation: int, before: int) -> int:
    """Pairs of an output and a tap of one dimension that meet inside the image."""
    places = np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation - before
    return int(((places >= 0) & (places < size)).sum())
