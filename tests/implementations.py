"""Which CPU implementation takes which problem, said independently of them: the sweeps hold every refusal against this."""

from __future__ import annotations

from collections.abc import Callable

import harness
from faltung import dispatch
from faltung.problem import ConvProblem

__all__ = ["BOUNDS", "MAY_TAKE", "SWEPT_APART", "TAKES", "applicable", "families", "verify"]

Predicate = Callable[[ConvProblem], bool]


def _zero_padded(p: ConvProblem) -> bool:
    return p.direction != "grad_input" or p.padding_mode == "zeros"


def _winograd(p: ConvProblem) -> bool:
    if p.g != 1 or p.k < 16 or not _zero_padded(p):
        return False
    most = 3 if p.dtype == "f64" else 5  # taps of a component: with more, transforms round whole numbers
    if p.direction == "grad_weight":
        return (p.r, p.s, p.stride) == (3, 3, (1, 1)) and max(p.dilation) <= 64 and p.c >= 16
    if p.stride == (1, 1):
        return p.r == p.s and 2 <= p.r <= most and max(p.dilation) <= 64 and p.c >= 16
    square = (p.r + 1) // 2 == (p.s + 1) // 2 and 3 <= p.r <= 2 * most
    few = p.direction == "forward" and p.c <= 4 and p.dtype == "f32"
    return (p.stride, p.dilation) == ((2, 2), (1, 1)) and square and (p.c >= 16 or few)


def _planes(p: ConvProblem) -> bool:
    return p.format == "nchw" and p.direction != "grad_weight" and p.dtype in ("f32", "f64") and _zero_padded(p)


def _matrices(p: ConvProblem) -> bool:
    """Whether the weight and the pixels are matrices in memory as they lie."""
    if p.g != 1 or any(p.padding):
        return False
    if (p.r, p.s) == (p.h, p.w):
        return p.dilation == (1, 1) and (p.format == p.weight_format or (p.r, p.s) == (1, 1))
    return (p.r, p.s, p.stride) == (1, 1, (1, 1)) and p.format == "nhwc"


def _outer(p: ConvProblem) -> bool:
    far = p.padding_mode == "circular" and any(p.padding) and p.format == "nchw"
    return p.direction == "grad_weight" and p.dtype in ("f32", "f64") and not far


def _taps(p: ConvProblem) -> bool:
    padded = p.padding_mode != "zeros" and (any(p.padding) or p.direction == "grad_input")
    source = p.c if p.direction == "forward" else p.k
    return p.direction != "grad_weight" and p.dtype in ("f32", "f64") and not padded and p.g == 1 and 1 < p.r * p.s <= 256 and source >= 16


def _depthwise_winograd(p: ConvProblem) -> bool:
    plain = p.kg == 1 and p.stride == p.dilation == (1, 1) and p.direction != "grad_weight" and p.dtype != "f64"
    return p.depthwise and plain and _zero_padded(p) and (max(p.r, p.s) if p.format == "nhwc" else p.s) >= 5


TAKES: dict[str, Predicate] = {
    "columns": lambda p: _zero_padded(p) and p.g == 1 and (p.r, p.s) != (1, 1),
    "direct": _zero_padded,
    "folded": lambda p: not _zero_padded(p),
    "pointwise": lambda p: _zero_padded(p) and (p.r, p.s, p.stride) == (1, 1, (1, 1)) and not any(p.padding),
    "depthwise": lambda p: _zero_padded(p) and p.depthwise,
    "depthwise_winograd": _depthwise_winograd,
    "winograd": _winograd,
    "outer": _outer,
    "taps": _taps,
}
"""Implementations that take exactly these problems when asked for by name."""

MAY_TAKE: dict[str, Predicate] = {
    "gemv": _matrices,
    "grouped": lambda p: _zero_padded(p) and p.g > 1 and not p.depthwise,
    "planes": _planes,
}
"""Implementations that refuse where they would not pay, and the only problems that they may take."""


SWEPT_APART = {"amx": ("test_amx", "test_amx_weight")}
"""Implementations for instructions that few processors have, with tables of their own, which run elsewhere with these instructions emulated."""


def families(dtype: str) -> set[str]:
    """Names of the implementations for this type."""
    return {*TAKES, *MAY_TAKE} - ({"planes", "outer", "taps"} if dtype in ("bf16", "f16") else {"depthwise_winograd"} if dtype == "f64" else set[str]())


BOUNDS = {"winograd": 1e-5, "depthwise_winograd": 1e-5}
"""Relative L2 error of the algorithms that save multiplications, in float32; the sums of all others are exact for whole numbers, and so are theirs in
float64.  In a 16-bit type the one rounding of a result hides their error, and the bound is everybody's."""


def applicable(problem: ConvProblem, threads: int = 2) -> list[str]:
    """Names of the implementations that must take a problem, and of those that chose to."""
    names = [name for name, takes in TAKES.items() if takes(problem)]
    for name, may_take in MAY_TAKE.items():
        if may_take(problem):
            try:
                harness.plan_named(name, problem, threads)
            except dispatch.Unsupported:
                continue
            names.append(name)
    return names


def verify(plan: dispatch.Plan, *, shift: int = 0, seed: int = 1, any_size: bool = False) -> str | None:
    """:func:`harness.verify` with the bound of the plan's implementation.

    ``any_size``: the problem was not chosen so that folded sums of 16 bits stay exact.
    """
    computed_by = plan.describe().get("padded_by", plan.implementation)  # folded adds up what another implementation computed
    bound = BOUNDS.get(computed_by, 0.0) if plan.problem.dtype == "f32" else 0.0
    # Folded gradients of 16 bits are rounded before and after they are added up (docs/reproducibility.md): exact as long as whole numbers have a place each.
    whole = {"bf16": 2.0**8, "f16": 2.0**11}.get(plan.problem.dtype) if any_size and plan.implementation == "folded" else None
    return harness.verify(plan, exact=computed_by not in BOUNDS or plan.problem.dtype == "f64", bound=bound, shift=shift, seed=seed, whole=whole)
