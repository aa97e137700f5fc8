"""Tiles, blocks and index tables as pure functions: they cover every output once, keep to registers and budgets, and name the right source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from faltung.codegen.numeric import Numeric
from faltung.cpu import depthwise_geometry, depthwise_tiling, direct, geometry, target, tiling
from faltung.cpu.depthwise_tile import Lanes
from faltung.cpu.geometry import Axis
from faltung.cpu.micro import largest_rows
from faltung.cpu.pointwise import joined
from faltung.problem import FORMATS, PADDING_MODES, ConvProblem, Direction
from faltung.reference import source_indices

TARGETS = sorted(target.TARGETS)
MANY = settings(max_examples=300, deadline=None)
SOME = settings(max_examples=80, deadline=None)


@given(total=st.integers(1, 5000), size=st.integers(1, 40))
@MANY
def test_split_is_the_fewest_even_pieces(total: int, size: int) -> None:
    wide, narrow = tiling.split_count(total, size)
    assert wide * size + narrow * (size - 1) == total
    assert wide + narrow == -(-total // size)
    assert tiling.split(total, size) == (wide >= 0)
    if size >= 2 and total >= (size - 1) * size:
        assert wide >= 0  # long enough totals always split


@given(count=st.integers(1, 3000))
@MANY
def test_tile_candidates_go_from_everything_to_one(count: int) -> None:
    sizes = list(tiling.tile_candidates(count))
    assert sizes[0] == count
    assert sizes[-1] == 1
    assert sizes == sorted(set(sizes), reverse=True)
    # every number of tiles is there with the smallest tile that gives it
    assert {-(-count // size) for size in sizes} == {-(-count // -(-count // pieces)) for pieces in range(1, count + 1)}


@pytest.mark.parametrize("isa", TARGETS)
@given(rows=st.lists(st.integers(1, 400), min_size=1, max_size=3), vectors=st.integers(1, 40), chunk=st.integers(16, 384), round_vectors=st.booleans())
@MANY
def test_block_fits_registers_and_splits_everything(isa: str, rows: list[int], vectors: int, chunk: int, round_vectors: bool) -> None:
    machine = target.TARGETS[isa]
    block = tiling.choose_block(machine, tuple(rows), vectors, chunk, round_vectors=round_vectors)
    assert block.rows * block.vectors + block.vectors + (1 if machine.fma else 2) <= machine.registers
    assert all(tiling.split(total, block.rows) for total in rows)
    assert round_vectors or tiling.split(vectors, block.vectors)
    assert 0 < block.cycles < float("inf")


@pytest.mark.parametrize("isa", TARGETS)
def test_most_rows_leave_room_for_operands(isa: str) -> None:
    machine = target.TARGETS[isa]
    for vectors in range(1, 5):
        rows = largest_rows(vectors, machine.registers, machine.fma)
        assert 1 <= rows <= 14
        assert rows * vectors + vectors + 1 <= machine.registers


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    """Problems with elements, in forward or grad_input."""
    r, s = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    mode = draw(st.sampled_from(PADDING_MODES))
    sides = [draw(st.integers(0, 4)) for _ in range(4)]
    if mode in ("reflect", "circular"):
        limit = (w - 1, w - 1, h - 1, h - 1) if mode == "reflect" else (w, w, h, h)
        sides = [min(side, most) for side, most in zip(sides, limit)]
    stride, dilation = ((draw(st.integers(1, 5)), draw(st.integers(1, 5))) for _ in range(2))
    g = draw(st.sampled_from((1, 1, 2, 3)))
    direction: Direction = draw(st.sampled_from(("forward", "grad_input")))
    n, c, k = draw(st.integers(1, 3)), g * draw(st.integers(1, 40)), g * draw(st.integers(1, 70))
    padding = (sides[0], sides[1], sides[2], sides[3])
    dtype, fmt = draw(st.sampled_from(("f32", "f64", "bf16", "f16"))), draw(st.sampled_from(FORMATS))
    mode = mode if direction == "forward" else "zeros"
    problem = ConvProblem(n, c, h, w, k, r, s, stride, padding, dilation, g, mode, dtype, fmt, "nchw", direction)
    rows, columns = problem.effective_kernel
    assume(h + sides[2] + sides[3] >= rows and w + sides[0] + sides[1] >= columns)
    return problem


def _check_axis(axis: Axis, outputs: int, kernel: int, expected: dict[int, dict[int, int]]) -> None:
    """``expected[output][tap]`` is the source index that the tap reads, left out where it reads a zero or nothing."""
    seen: dict[int, dict[int, int]] = {}
    for phase in axis.phases:
        for i in range(phase.count):
            output = phase.start + i * axis.output_step
            assert output not in seen, "two phases produce one output"
            taps = seen[output] = {}
            for tap in phase.taps:
                entry = axis.table_start(tap.slab) + i * axis.advance + tap.shift
                assert entry < axis.table_start(tap.slab) + axis.entries(axis.covered) + axis.slabs[tap.slab].extent
                source = int(axis.table[entry])
                assert -1 <= source < axis.size
                if source >= 0:
                    assert tap.kernel_index not in taps
                    taps[tap.kernel_index] = source
    assert sorted(seen) == list(range(outputs))
    assert seen == expected
    for slab in range(len(axis.slabs)):
        first, last = axis.interior(slab)
        begin, length = axis.table_start(slab), axis.entries(axis.covered) + axis.slabs[slab].extent
        inside = axis.table[begin + first : begin + last]
        assert np.array_equal(inside, np.arange(first, last) * axis.step + axis.slabs[slab].offset)
        if axis.padding_mode == "zeros":
            outside = np.concatenate([axis.table[begin : begin + first], axis.table[begin + last : begin + length]])
            assert (outside == -1).all()


@given(problem=problems(), tile=st.tuples(st.integers(1, 12), st.integers(1, 12)), dense=st.booleans())
@MANY
def test_axes_name_what_every_tap_reads(problem: ConvProblem, tile: tuple[int, int], dense: bool) -> None:
    left, right, top, bottom = problem.padding
    sides = (
        (problem.h, problem.p, problem.r, problem.stride[0], problem.dilation[0], top, bottom),
        (problem.w, problem.q, problem.s, problem.stride[1], problem.dilation[1], left, right),
    )
    for axis, (size, outputs, kernel, stride, dilation, before, after) in zip(geometry.axes(problem, tile, dense=dense), sides):
        sources = source_indices(size, before, after, problem.padding_mode)
        gathered = {o: {t: int(sources[o * stride + t * dilation]) for t in range(kernel) if sources[o * stride + t * dilation] >= 0} for o in range(outputs)}
        if problem.direction == "forward":
            _check_axis(axis, outputs, kernel, gathered)
        else:
            _check_axis(axis, size, kernel, {i: {t: o for o, taps in gathered.items() for t, source in taps.items() if source == i} for i in range(size)})


@pytest.mark.parametrize("isa", TARGETS)
@given(problem=problems(), threads=st.integers(1, 8))
@SOME
def test_direct_configuration_keeps_its_budgets(isa: str, problem: ConvProblem, threads: int) -> None:
    machine = target.TARGETS[isa]
    config = direct.choose_config(problem, machine, threads)
    rows, columns = geometry.axes(problem, config.tile)
    assert 1 <= config.tile[0] <= rows.count
    assert 1 <= config.tile[1] <= columns.count
    assert config.chunk >= 16
    assert config.k_blocks >= 1
    roles = direct.Roles(problem)
    size = 8 if problem.dtype == "f64" else 4
    packed = rows.scratch_starts[-1] * columns.scratch_starts[-1] * roles.source_channels * size
    if config.tile[0] > 1:
        assert packed <= machine.l2 // 2
    # the length of the pieces decides the order of a sum's terms: it must not depend on what reproducible results must not depend on
    for other in (replace(problem, n=problem.n + 5), replace(problem, n=1)):
        assert direct.choose_config(other, machine, threads).chunk == config.chunk
    assert direct.choose_config(problem, machine, threads + 3).chunk == config.chunk
    assert {direct.choose_config(problem, machine, threads, orientation).chunk for orientation in ("channels", "pixels")} == {config.chunk}


def test_joined_pixels_are_cut_into_small_tiles_and_many() -> None:
    """1x1 in nhwc: a quarter of a megabyte of pixels at most, more tasks than threads; a small image whose weights fill the cache stays one tile."""
    machine = replace(target.TARGETS["avx512"], l2=2 << 20)
    for text in ("n1c1024h32w32k2048r1s1", "n1c256h64w64k128r1s1", "n8c512h28w28k128r1s1"):
        row = joined(ConvProblem.parse(f"forward f32 nhwc {text} wnhwc"))
        config = direct.choose_config(row, machine, 2, "channels")
        assert config.tile[1] * row.c * 4 <= 256 << 10
        assert -(-row.w // config.tile[1]) * config.k_blocks >= 8
    alone = joined(ConvProblem.parse("forward f32 nhwc n1c2048h7w7k1024r1s1 wnhwc"))
    assert direct.packs_at_use(alone, machine, direct.choose_config(alone, machine, 2, "channels"))


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_many_planes_whole_pages_apart_are_not_written_side_by_side(isa: str) -> None:
    """Vectors over pixels write a plane's row each, vectors over channels a line of as many planes: slow where these meet in one set of a cache."""
    for problem, orientation in (
        ("n1c3h224w224k64r3s3 p1", "pixels"),  # planes of 49 pages
        ("n1c3h112w112k64r3s3 p1", "channels"),
        ("grad_input n1c64h64w64k12r3s3 p1", "pixels"),
        ("n1c3h320w320k3r3s3 p1", "pixels"),  # channels fill no vector
    ):
        chosen = direct.choose_config(ConvProblem.parse(problem), target.TARGETS[isa], 2)
        assert chosen.orientation == orientation, problem


def test_depthwise_tasks_take_whole_pixels_where_threads_are_not_idle() -> None:
    """nhwc with AVX-512 at full rate: up to 32 vectors of channels side by side, 64 where tasks are left for every thread."""
    machine = replace(target.TARGETS["avx512"], l2=2 << 20)
    slow = replace(machine, cpu="znver4")
    for text, wanted in (("n1c1024h7w7k1024r5s5 p2 g1024", 32), ("n8c1024h7w7k1024r5s5 p2 g1024", 64), ("n8c144h56w56k144r3s3 p1 g144", 9)):
        problem = ConvProblem.parse(f"forward f32 nhwc {text} wnhwc")
        lanes = Lanes(Numeric("f32", machine), "nhwc", "same", False)
        axes = depthwise_geometry.lines(problem, reduce_columns=True)
        assert depthwise_tiling.tiling(problem, lanes, axes, machine, 2).vectors == wanted
        assert depthwise_tiling.tiling(problem, lanes, axes, slow, 2).vectors <= 8
