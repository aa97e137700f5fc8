"""The CUDA engine's kernels compiled for GPUs that are not there: matrix instructions are used, registers do not spill.

And, with no GPU and no compiler, what chooses them: the axes of a gather, and the configurations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from faltung import reference
from faltung.cuda import tiling
from faltung.cuda.gather import phases
from faltung.cuda.indexing import divider
from faltung.cuda.runtime import Device, alignment
from faltung.problem import DIRECTIONS, FORMATS, ConvProblem

PROBLEMS = (
    ("n32c64h56w56k64r3s3 p1 bias", "bf16", True),
    ("n32c64h28w28k64r3s3 p1", "f32", True),
    ("n32c24h28w28k40r3s3 st2 p1", "f16", True),
    ("n8c32h14w14k32r3s3 p1", "f64", True),
    ("n32c64h28w28k64r3s3 p1 g16", "bf16", True),
    ("n32c3h64w64k64r7s7 st2 p3", "bf16", True),
    ("n32c64h28w28k64r3s3 p1 g64", "bf16", False),
    ("n32c64h28w28k64r7s7 p3 g64", "bf16", None),
    ("n4c32h56w56k32r31s31 p15 g32", "bf16", True),
)
"""Problem, type, and whether its kernels multiply matrices (None: in nchw only)."""


def compiled(architecture: int | str) -> list[dict[str, object]]:
    """Facts of every kernel of every problem, direction and format, compiled in a process without the interpreter."""
    script = (
        "import json, sys\n"
        "from faltung import dispatch\n"
        "from faltung.cuda.offline import compile_plan\n"
        "from faltung.problem import ConvProblem\n"
        "from faltung.cuda import runtime\n"
        "order = json.load(sys.stdin)\n"
        "architecture = order['architecture']\n"
        "if architecture == 80:\n"
        "    runtime.DEFAULT = runtime.Device('NVIDIA A100', (8, 0), 108, 166912, 40 << 20)\n"
        "if architecture == 'gfx942':\n"
        "    runtime.DEFAULT = runtime.Device('AMD Instinct MI300X', (9, 4), 304, 65536, 4 << 20)\n"
        "for text in order['problems']:\n"
        "    plan = dispatch.plan(ConvProblem.parse(text), 'cuda')\n"
        "    for kernel in compile_plan(plan, architecture):\n"
        "        print(json.dumps({'problem': text, 'kernel': kernel.name, 'matrix': kernel.count('wgmma.mma_async', 'mma.sync', 'v_mfma'),\n"
        "                          'stack': kernel.stack, 'shared': kernel.shared, 'registers': kernel.registers}))\n"
    )
    texts = []
    for position, (case, dtype, _) in enumerate(PROBLEMS):
        for direction in DIRECTIONS:
            fmt = FORMATS[(position + DIRECTIONS.index(direction) + (architecture == 90)) % 2]
            problem = replace(ConvProblem.parse(case), dtype=dtype, format=fmt, weight_format=fmt)
            texts.append(str(problem.with_direction(direction, bias=problem.epilogue.bias and direction != "grad_input")))
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": os.pathsep.join(sys.path)}
    order = json.dumps({"problems": texts, "architecture": architecture})
    done = subprocess.run([sys.executable, "-c", script], input=order, capture_output=True, text=True, env=environment, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", (80, 90, "gfx942"))
def test_kernels_compile_without_a_device(architecture: int | str) -> None:
    rows = compiled(architecture)
    assert len({row["problem"] for row in rows}) == 3 * len(PROBLEMS)
    assert len(rows) >= 4 * len(PROBLEMS)
    limit = {80: 163, 90: 227, "gfx942": 64}[architecture]
    for row in rows:
        assert row["stack"] == 0, f"registers spill: {row}"
        assert int(str(row["shared"])) <= limit << 10, f"too much shared memory: {row}"
    multiplying = {"igemm_kernel", "igemm_weight_kernel", "banded_kernel", "banded_weight_kernel"}
    for row in rows:
        assert (row["kernel"] in multiplying) == (row["matrix"] != 0), row
    seen = {row["kernel"] for row in rows}
    others = {"depthwise_kernel", "depthwise_weight_kernel", "reduce_kernel", "bias_kernel", "transpose_kernel", "merge_kernel", "pad_kernel"}
    assert seen >= multiplying | others
    for case, _, matrices in PROBLEMS:
        sizes = case.removesuffix(" bias")
        mine = [row for row in rows if sizes in str(row["problem"])]
        assert mine, case
        if matrices is not None:
            assert any(row["matrix"] for row in mine) == matrices, f"{case}: {mine}"


CASES = (
    "n1c1h9w11k1r3s3 p1",
    "n1c1h9w11k1r3s3 st2 p1",
    "n1c1h13w17k1r5s4 st3x2 p2,1,0,3",
    "n1c1h12w12k1r3s3 st2 d2 p2",
    "n1c1h14w13k1r3s2 st4x3 d3x2 p1",
    "n1c1h7w7k1r2s2 st3",
    "n1c1h6w6k1r3s3 st6",
    "n1c1h5w5k1r1s1",
)


@pytest.mark.parametrize("case", CASES)
def test_phases_are_the_convolution(case: str) -> None:
    """Walked tap by tap, the phases of forward and grad_input join the same pairs of indices as the definition."""
    problem = ConvProblem.parse(case)
    left, right, top, bottom = problem.padding
    for axis, (size, outputs, kernel, before, after) in enumerate(
        ((problem.h, problem.p, problem.r, top, bottom), (problem.w, problem.q, problem.s, left, right))
    ):
        sources = reference.source_indices(size, before, after, "zeros")
        stride, dilation = problem.stride[axis], problem.dilation[axis]
        wanted = {(o, int(sources[o * stride + t * dilation]), t) for o in range(outputs) for t in range(kernel)}
        wanted = {triple for triple in wanted if triple[1] >= 0}
        for direction in ("forward", "grad_input"):
            found, written = set(), []
            for phase in {(p.rows, p.columns)[axis] for p in phases(problem.with_direction(direction))}:
                for i in range(phase.count):
                    place = phase.start + i * phase.step
                    written.append(place)
                    for j in range(phase.taps):
                        read, tap = phase.source(i, j), phase.first_tap + j * phase.tap_step
                        if 0 <= read < (size if direction == "forward" else outputs):
                            found.add((place, read, tap) if direction == "forward" else (read, place, tap))
            assert found == wanted
            assert sorted(written) == list(range(outputs if direction == "forward" else size))


SIZES = ("n1c1h1w1k1r1s1", "n1c3h32w32k7r3s3 p1", "n256c64h56w56k64r3s3 p1", "n4c512h256w256k512r3s3 p1", "n1c2048h1w1k1000r1s1", "n2c24h7w7k1280r1s1 g8")


@pytest.mark.parametrize("dtype", ("f32", "f64", "bf16", "f16"))
@pytest.mark.parametrize("case", SIZES)
def test_every_choice_is_supported(case: str, dtype: str) -> None:
    for facts in (Device(), Device("small", (8, 6), 20, 99 << 10, 4 << 20)):
        problem = replace(ConvProblem.parse(case), dtype=dtype)
        for direction in ("forward", "grad_input"):
            turned = problem.with_direction(direction)
            candidates = tiling.igemm_candidates(turned, facts)
            assert candidates[0] == tiling.choose_igemm(turned, facts)
            assert all(tiling.supports(c, dtype, facts) for c in candidates)
            assert len(set(candidates)) == len(candidates)
        turned = problem.with_direction("grad_weight")
        weights = tiling.weight_candidates(turned, facts)
        assert weights[0] == tiling.choose_weight(turned, facts)
        assert all(tiling.supports(c, dtype, facts) for c in weights)


def test_splits_follow_from_the_problem_alone() -> None:
    """The number of splits shapes the sum, so another GPU must not change it: only tiles too large for its memory may differ."""
    problem = ConvProblem.parse("n64c64h56w56k64r3s3 p1").with_direction("grad_weight")
    assert tiling.choose_weight(problem, Device()).splits == tiling.choose_weight(problem, Device("other", (9, 0), 16)).splits
    assert tiling.split_count(10, 64, 1) == 1
    assert tiling.split_count(1 << 20, 64, 1) == 264
    assert tiling.split_count(1 << 20, 64, 264) == 1


def test_alignment() -> None:
    assert (alignment(64, 3136), alignment(24, 40), alignment(12), alignment(6, 8), alignment(7), alignment(0, 8)) == (8, 8, 4, 2, 1, 8)


def test_merged_groups() -> None:
    def merged(case: str) -> int:
        return tiling.merged_groups(ConvProblem.parse(case))

    assert merged("n1c256h8w8k256r3s3 g32") == 4
    assert merged("n1c64h8w8k64r3s3 g2") == 1
    assert merged("n1c8h8w8k8r3s3 g8") == 1
    assert merged("n1c21h8w8k21r3s3 g7") == 7


@pytest.mark.parametrize("divisor", (1, 2, 3, 7, 49, 56, 641, 3136, 65535, 65536, 65537, 50176, 2**30 + 1, 2**31 - 1))
def test_division_by_multiplication(divisor: int) -> None:
    """What the kernels compute with :func:`divider`'s integers, at the edges of every quotient that is tried."""
    multiplier, shift = divider(divisor)
    assert -(2**31) <= multiplier < 2**31
    quotients = {0, 1, 2, 3, (2**31 - 1) // divisor, (2**31 - 1) // divisor // 2, 12345 % ((2**31 - 1) // divisor + 1)}
    for index in {q * divisor + offset for q in quotients for offset in (-1, 0, 1, divisor - 1)} | {2**31 - 1}:
        if 0 <= index < 2**31:
            assert (((multiplier % 2**32) * index >> 32) + index) >> shift == index // divisor
