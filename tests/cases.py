"""The table of convolution problems that every sweep of the tests runs over.

A line is a problem string without direction, element type and formats: the sweeps put those in.  Sizes stand at the edges of tiles: 1, one less
than a vector, a vector, one more, and primes, for vectors of 2 (float64 on SSE2) to 16 (float32 on AVX-512) elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from faltung.problem import FORMATS, PADDING_MODES, ConvProblem, Direction, Epilogue, Format

__all__ = ["CASES", "SECTIONS", "TARGET_CASES", "UNEVEN_PADDING", "biased", "problem", "variants"]

_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)

CASES: dict[str, tuple[str, ...]] = {
    "named": (
        "n1c1h1w1k1r1s1",
        "n1c1h4w4k1r1s1",
        "n1c3h8w8k8r3s3 p1",  # the smallest call of a network's first layer
        "n2c1h28w28k32r3s3 p1",  # digits, first layer
        "n1c32h14w14k64r3s3 p1",  # digits, second layer
        "n1c3h32w33k64r7s7 st2 p3",  # the stem of a residual network
        "n1c3h16w16k16r4s4 st4",  # patches
        "n2c64h7w7k64r3s3 p1",
        "n1c64h8w8k64r3s3 st2 p1",  # a downsampling layer
        "n1c64h14w14k32r1s1",
        "n1c64h14w14k32r1s1 st2",
        "n1c128h4w4k96r3s3 p1",
        "n1c16h9w9k32r5s5 p2",
    ),
    "channels": (
        *(f"n1c{size}h5w6k3r3s3 p1" for size in _SIZES),
        *(f"n1c3h6w5k{size}r3s3 p1" for size in _SIZES),
        *(f"n2c{size}h3w3k{size}r1s1" for size in (1, 7, 8, 9, 16, 17)),
        "n1c13h7w11k37r3s3 p1",
        "n1c61h3w5k67r3s3 p1",
        "n1c1h9w9k100r3s3",
        "n1c100h9w9k1r3s3",
    ),
    "pixels": (
        *(f"n1c4h3w{size}k5r3s3 p1" for size in _SIZES),
        *(f"n1c4h{size}w2k6r3s3 p1" for size in _SIZES),
        "n1c2h1w67k3r1s3 p0x1",
        "n1c2h67w1k3r3s1 p1x0",
        "n3c2h13w29k3r2s2",
        "n5c3h6w7k4r3s3",
        "n7c1h5w5k2r2s2",
        "n2c5h3w130k6r3s3 p1",
        "n1c3h130w3k6r3s3 p1",
        *(f"n2c{size + 2}h1w{size}k19r1s1" for size in (3, 5, 6, 7, 11, 12, 13, 49)),  # rows of pixels of 1x1 layers, in blocks of 4 and 6
        "n1c193h3w17k33r1s1",
        "n1c18h32w32k33r1s1",  # planes of whole pages
    ),
    "kernels": (
        "n1c3h7w9k4r1s3 p0x1",
        "n1c3h9w7k4r3s1 p1x0",
        "n1c3h7w8k4r2s2",
        "n1c3h7w8k4r2s4 p1x2",
        "n1c3h11w11k4r4s2 p2x1",
        "n1c2h11w13k3r5s7 p2x3",
        "n1c2h17w15k3r11s9 p5x4",
        "n1c2h4w5k3r4s5",  # one output
        "n1c2h9w35k2r1s31 p0x15",
        "n1c2h35w9k2r31s1 p15x0",
        "n1c1h33w31k2r31s31 p15",
        "n1c3h2w2k4r5s5 p2",  # a kernel larger than the image
        "n2c16h11w12k17r2s2 p1",
        "n1c17h9w8k16r4s4 p1,2,1,2",
        "n1c16h3w2k18r5s5 p3",
    ),
    "strides": (
        "n1c3h9w11k5r3s3 st2",
        "n1c3h9w12k5r3s3 st2 p1",
        "n1c3h10w11k5r3s3 st3 p1",
        "n1c3h10w11k5r3s3 st1x2 p1",
        "n1c3h10w11k5r3s3 st2x1 p1",
        "n1c3h12w13k5r2s2 st3",  # columns that no output reads
        "n1c3h13w17k5r1s1 st4",
        "n1c3h9w70k5r5s6 st4 p2",  # rows of more columns than lanes
        "n1c3h16w33k5r3s3 st5x7 p1",
        "n1c2h7w70k3r3s5 st1x2 p1x2",
        "n1c2h7w70k3r3s3 st1x3 p1",
        "n1c17h7w35k18r3s3 st2 p1",
        "n2c4h6w6k4r3s3 st9",  # a stride beyond the image
        "n1c2h20w20k3r7s7 st4 p3",
        "n1c18h9w10k16r6s6 st2 p2",
        "n1c40h11w8k16r5s6 st2 p1,2,0,3",
        "n2c4h13w39k16r8s8 st2 p3",
        "n1c1h9w40k17r5s5 st2 p1,2,0,3",
        "n1c3h6w5k16r7s7 st2 p3",  # a first layer whose image is smaller than its kernel
    ),
    "dilations": (
        "n1c3h11w12k5r3s3 d2 p2",
        "n1c3h11w12k5r3s3 d3 p3",
        "n1c3h11w12k5r3s3 d1x4 p1x4",
        "n1c3h11w12k5r3s3 d5x1 p5x1",
        "n1c3h11w12k5r3s3 d2 st2 p2",
        "n1c3h13w12k5r3s3 d3 st2 p3",  # taps on both residues of the stride
        "n1c3h12w13k5r2s2 d2 st4",
        "n1c2h17w19k3r3s3 d6 p6",
        "n1c2h9w40k3r3s3 d12 p12",  # taps that read nothing but padding
        "n1c2h5w6k3r3s3 d256 p256",
        "n1c2h7w7k3r3s2 d64x128 p64",
        "n1c2h20w20k3r2s2 d19",  # one output
        "n1c2h4w300k3r1s2 d1x256",
        "n1c17h11w19k16r3s3 d2 p2",
        "n1c80h9w8k64r3s3 d6 p6",  # most taps outside, many channels
        "n2c16h7w6k18r3s3 d3x9 p3x9",  # a residue for every column
    ),
    "padding": (
        "n1c3h6w7k4r3s3 p1,0,0,0",
        "n1c3h6w7k4r3s3 p0,1,0,0",
        "n1c3h6w7k4r3s3 p0,0,1,0",
        "n1c3h6w7k4r3s3 p0,0,0,1",
        "n1c3h6w7k4r3s3 p3,1,2,5",
        "n1c3h6w7k4r4s4 p1,2,1,2",  # 'same' with an even kernel
        "n1c3h7w6k4r2s2 p0,1,0,1 st2",
        "n1c3h2w3k4r3s3 p7",  # outputs that see nothing but padding
        "n1c2h5w6k3r1s1 p2",
        "n1c2h5w6k3r1s1 p3 st2",
        "n1c2h1w1k3r3s3 p1",
        "n1c2h3w3k3r3s3 p40x50",
    ),
    "modes": (
        *(
            f"{sizes} {mode}"
            for mode in ("reflect", "replicate", "circular")
            for sizes in (
                "n1c3h6w7k4r3s3 p1",
                "n2c3h6w7k5r5s5 p2,1,1,2",
                "n1c2h9w35k3r3s3 p1 st2",
                "n1c2h9w20k3r3s3 p4 d4",
                "n1c2h3w4k3r3s3 p2",  # reflected rows are read from both sides
                "n1c18h5w17k17r3s3 p1",
                "n1c3h7w8k4r3s3 p3,0,0,2 st3x2",
                "n1c4h6w6k4r3s3 p1 g4",
                "n1c4h6w7k6r3s3 p1 g2",
                "n1c3h6w7k4r1s1 p1",
                "n1c3h11w14k16r7s7 st2 p3",
                "n1c16h7w6k17r3s3 st2 p1",
            )
        ),
        "n1c2h1w1k3r3s3 p1 replicate",
        "n1c2h1w1k3r3s3 p1 circular",
        "n1c2h1w5k3r1s3 p0x1 reflect",
        "n1c2h3w3k3r3s3 p9 replicate",
        "n1c2h3w4k3r3s3 p3x4 circular",  # as wide as the image
    ),
    "groups": (
        "n1c4h6w7k4r3s3 p1 g2",
        "n1c6h6w7k9r3s3 p1 g3",
        "n2c8h5w6k4r3s3 p1 g4",
        "n1c34h5w9k34r3s3 p1 g2",
        "n1c64h5w6k64r3s3 p1 g8",
        "n1c32h6w7k16r1s1 g4",
        "n1c32h5w7k32r3s3 p1 g2",  # a group a vector
        "n1c10h6w7k15r3s3 p1 g5 st2",
        "n1c14h6w7k14r2s3 g7 d2x1",
        "n1c48h3w4k51r3s3 p1 g3",
        "n1c6h9w9k6r3s3 p1 g3 st3x2",
    ),
    "depthwise": (
        *(f"n1c{size}h6w7k{size}r3s3 p1 g{size}" for size in (2, 3, 7, 8, 9, 15, 16, 17, 33)),
        *(f"n1c3h4w{size}k3r3s3 p1 g3" for size in (1, 7, 8, 9, 15, 16, 17, 33)),
        "n2c5h9w9k5r3s3 g5 st2 p1",
        "n1c5h9w10k5r5s5 g5 st2 p2",
        "n1c5h13w14k5r3s3 g5 st3x1 p1",
        "n1c5h12w12k5r2s2 g5 st4",
        "n1c5h9w9k5r5s5 g5 p2 d2x1",
        "n1c5h12w35k5r3s3 g5 p3 d3",
        "n1c5h12w13k5r3s3 g5 p2 d2 st2",
        "n1c3h17w17k3r7s7 g3 p3",
        "n1c2h33w34k2r31s31 g2 p15",
        "n1c2h9w9k2r31s31 g2 p15",  # a kernel larger than the image
        "n1c3h3w3k3r3s3 g3 d64 p64",
        "n1c4h6w7k8r3s3 g4 p1",  # a multiplier
        "n1c5h6w7k15r3s3 g5 p1",
        "n1c17h5w6k34r3s3 g17 st2 p1",
        "n1c3h8w8k3r1s1 g3",
        "n1c3h6w7k6r3s3 g3 p2,0,1,3",
        "n1c4h9w1k4r5s1 g4 p2x0",
        "n1c5h7w9k5r2s4 g5 p1x2",
    ),
    "wide depthwise": (
        "n1c17h9w14k17r5s5 p2 g17",
        "n1c5h13w30k5r7s17 p8,8,3,3 g5",
        "n2c3h6w61k3r3s9 p4,4,1,1 g3",  # two register blocks a row
        "n1c2h40w5k2r31s5 p2,2,15,15 g2",
        "n1c9h5w4k9r5s7 p3,3,2,2 g9",  # one block of outputs, many rows abreast
        "n1c2h4w130k2r5s51 p25,25,2,2 g2",  # groups of taps in two pieces
        "n1c33h7w9k33r5s6 g33",
        "n2c19h30w13k19r17s3 p1,2,6,8 g19",  # in nhwc along columns
        "n1c3h8w12k3r6s9 p7,1,0,4 g3",
        "n1c4h6w7k4r13s13 p6 g4",  # rows and columns of nothing but padding
        "n2c16h14w14k16r9s15 p7,7,4,4 g16",
    ),
    "few pixels": (
        "n1c67h1w1k37r1s1",
        "n1c16h1w1k8r1s1",
        "n2c15h1w1k7r1s1",
        "n3c33h1w1k270r1s1",  # rows of the weight: more than two pieces of a sum
        "n4c130h1w1k9r1s1",
        "n5c64h1w1k17r1s1",
        "n9c31h1w1k12r1s1",
        "n2c1030h1w1k3r1s1",  # a row longer than a piece
        "n1c700h1w1k500r1s1",  # for two threads
        "n33c5h1w1k3r1s1",
        "n1c5h2w3k6r1s1",
        "n1c9h5w13k11r1s1",  # 65 pixels
        "n2c6h4w5k17r4s5",
        "n1c3h2w2k4r2s2 st2",
        "n3c5h1w7k9r1s7",
    ),
    # Each line once gave a wrong answer; its comment says why.
    "regressions": ("n1c1h1w1k2r1s1 p1 st2",),
}
"""Problem strings by section."""

SECTIONS: tuple[str, ...] = tuple(CASES)

TARGET_CASES: tuple[str, ...] = (
    "n1c3h8w9k8r3s3 p1",
    "n1c17h6w9k19r3s3 p1",
    "n2c5h9w17k37r3s3 p1",
    "n1c3h16w33k16r7s7 st2 p3",
    "n1c9h8w9k10r1s1",
    "n2c65h5w11k40r1s1",
    "n1c5h9w11k7r3s3 st3x2 p1 d2",
    "n1c3h5w6k4r3s3 p1,2,0,1 reflect",
    "n1c6h6w7k10r3s3 p1 g2",
    "n1c9h6w19k9r3s3 p1 g9",
    "n1c17h6w19k17r5s9 p4,4,2,2 g17",
    "n1c5h9w10k10r5s5 p2 g5 st2",
    "n1c18h7w9k17r3s3 p1",
    "n1c17h9w14k18r3s3 p2 d2",
    "n1c17h9w11k16r3s3 p1 st2",
    "n1c16h8w9k17r5s5 p2",
    "n1c16h6w7k16r3s3 p1 g8",
    "n1c32h5w7k32r3s3 p1 g2",
    "n5c21h1w1k37r1s1",
    "n2c5h3w4k9r3s4",
)
"""What is run on every instruction set of the machine: one problem for every way through the generators."""


def problem(case: str, direction: Direction, dtype: str, fmt: Format, weight_format: Format, *, bias: bool = False) -> ConvProblem:
    """The problem of a line of the table in a direction, type and formats."""
    return replace(ConvProblem.parse(case), direction=direction, dtype=dtype, format=fmt, weight_format=weight_format, epilogue=Epilogue(bias=bias))


UNEVEN_PADDING = [
    *((mode, padding) for mode in PADDING_MODES for padding in ("0,0,0,0", "2,0,1,3", "0,2,2,0", "3,1,0,2")),
    ("zeros", "-1,2,1,-1"),
]
"""Modes with paddings of a 3x3 kernel that differ from side to side; only zeros may be negative."""


def biased(position: int, direction: Direction) -> bool:
    """Whether the case at a position of its section has a bias (or its gradient): every second one."""
    return position % 2 == 0 and direction != "grad_input"


def variants(section: str, direction: Direction, dtype: str) -> Iterator[ConvProblem]:
    """Every case of a section in a direction and type: in all pairs of formats for f32, with weights of alternating format for the others.

    The types of 16 bits, which differ in how they are converted and in nothing else, share the cases: the even ones are bfloat16's, the odd ones float16's.
    """
    for position, case in enumerate(CASES[section]):
        if dtype in ("bf16", "f16") and len(CASES[section]) > 1 and position % 2 != (dtype == "f16"):
            continue
        for turn, fmt in enumerate(FORMATS):
            for weight_turn, weight_format in enumerate(FORMATS):
                if dtype == "f32" or ((position // 2 if dtype in ("bf16", "f16") else position) + turn + weight_turn) % 2 == 0:
                    yield problem(case, direction, dtype, fmt, weight_format, bias=biased(position + weight_turn, direction))


def _check() -> None:
    for section, lines in CASES.items():
        for line in lines:
            parsed = ConvProblem.parse(line)
            if parsed.empty or parsed.c % parsed.g or parsed.k % parsed.g:
                raise ValueError(f"{section}: not a convolution with elements: {line}")
        if len(set(lines)) != len(lines):
            raise ValueError(f"{section}: a case stands twice")


_check()
