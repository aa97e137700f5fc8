"""Convolution on matrix tiles (AMX), forward and grad_input."""

from __future__ import annotations

import pytest

import cases
import harness
from faltung.cpu import target
from faltung.problem import FORMATS, ConvProblem, Direction
from instruction_sets import needs_isa

AMX = "amx"

CASES = (
    *(f"n2c{c}h5w6k3r3s3 p1" for c in (1, 2, 31, 33, 64, 66, 100)),  # odd channels, one and several blocks of pairs
    *(f"n1c4h6w5k{k}r3s3 p1" for k in (1, 16, 17, 32, 47, 65)),  # wide and narrow panels
    *(f"n{n}c3h5w{w}k6r3s3 p1" for n, w in ((1, 1), (1, 7), (2, 16), (3, 2), (3, 17), (3, 33), (1, 70))),
    "n1c3h1w1k4r1s1",
    "n1c32h2w2k4r2s2",
    "n5c6h7w7k9r3s3 p1",
    "n3c7h9w12k5r3s3 st2 p1",
    "n2c6h9w70k5r3s3 st2 p1",
    "n1c40h8w8k6r2s2 st2",
    "n2c5h10w13k8r5s5 st3x2 p2",
    "n2c5h10w23k8r4s4 st4",
    "n1c5h9w9k7r1s1 st3",  # phases of grad_input without taps
    "n2c5h9w11k7r3s3 d2x3 p2x3",
    "n2c6h6w7k10r3s3 p1 g2",
    "n2c8h6w7k66r3s3 p1 g2",
    "n2c3h5w6k4r4s4 p1,2,1,2",
    *(f"n2c5h6w7k6r3s3 p2,1,1,2 {mode}" for mode in ("reflect", "replicate", "circular")),
    "n2c6h6w8k4r7s7 p3",
    "n2c400h3w5k18r3s3 p1",
    "n1c61h7w7k66r3s3 p1",
    "n1c450h1w20k20r1s1",
    "n2c700h3w3k9r1s1",
    "n2c64h5w5k40r1s1",  # read in place in nhwc
    "n1c96h4w4k33r1s1",
    "n1c64h3w5k33r1s1",
    "n2c2048h4w4k8r1s1",
    *(f"n{n}c{c}h{h}w5k{k}r1s1" for n, c, h, k in ((1, 6, 3, 5), (2, 7, 3, 17), (3, 8, 3, 16), (1, 9, 1, 4), (3, 5, 1, 33))),
    "n2c6h5w4k8r1s1 g2",
    "n2c64h5w4k128r1s1 g2",
)


def _problems(direction: Direction, dtype: str) -> list[ConvProblem]:
    return [
        cases.problem(case, direction, dtype, fmt, weight_format, bias=cases.biased(position, direction))
        for position, case in enumerate(CASES)
        for turn, fmt in enumerate(FORMATS)
        for weight_format in (FORMATS[(position + turn) % 2],)
    ]


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
def test_results(direction: Direction, dtype: str) -> None:
    """Whole numbers exactly, others within twice PyTorch's error, from workspaces of NaN."""
    with target.use_target(AMX):
        outcome = harness.sweep(_problems(direction, dtype), "amx", harness.verify)
    assert outcome.ran >= 80
