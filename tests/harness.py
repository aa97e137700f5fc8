"""Runs one plan on memory that shows misuse: outputs and workspaces of NaN, canaries on both sides of every operand, inputs compared afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faltung import config, dispatch, layout, testing
from faltung.problem import DTYPES, ConvProblem

__all__ = [
    "Misuse", "Operand", "Outcome", "accepted", "deviation", "equal_bits",
    "equal_where_not_finite", "launch", "operands", "plan_named", "sweep", "verify",
]  # fmt: skip

_MARGIN = 256
_CANARY, _POISON = 0xA5, 0xFF  # bytes 0xFF are a NaN in every type


class Misuse(AssertionError):
    """A kernel wrote where it must not."""


@dataclass(frozen=True)
class Operand:
    """One of a plan's four operands: ``tensor`` is None where it is written."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    tensor: Tensor | None

    def bytes(self, dtype: str) -> int:
        return int(np.prod(self.shape)) * DTYPES[dtype]


def operands(problem: ConvProblem, inputs: testing.Inputs) -> tuple[Operand, Operand, Operand | None, Operand]:
    """The operands in the order in which a plan takes them; the third is None where there is none."""

    def read(name: str) -> Operand:
        tensor: Tensor = getattr(inputs, name)
        return Operand(name, tuple(tensor.shape), tensor.stride(), tensor)

    first, second = {"forward": ("x", "w"), "grad_input": ("gy", "w"), "grad_weight": ("x", "gy")}[problem.direction]
    name = {"forward": "y", "grad_input": "gx", "grad_weight": "gw"}[problem.direction]
    strides = layout.strides_of(problem.result_shape, problem.result_format)
    side = None
    if problem.epilogue.bias:
        side = Operand("gb", (problem.k,), (1,), None) if problem.direction == "grad_weight" else read("bias")
    return read(first), read(second), side, Operand(name, problem.result_shape, strides, None)


class _Buffer:
    """An operand's memory with canaries before and behind; ``shift`` moves its start off the alignment of vectors, by bytes."""

    def __init__(self, operand: Operand, dtype: str, shift: int) -> None:
        size = operand.bytes(dtype)
        self.operand, self._dtype = operand, testing.TORCH_DTYPES[dtype]
        self._memory: npt.NDArray[np.uint8] = np.full(size + 3 * _MARGIN, _CANARY, np.uint8)
        start = -(self._memory.ctypes.data + _MARGIN) % 64 + _MARGIN + shift
        self._inside, self._around = self._memory[start : start + size], (self._memory[:start], self._memory[start + size :])
        self._inside[:] = _POISON
        if operand.tensor is not None:
            self.tensor().copy_(operand.tensor)
        self._first = self._inside.copy()
        self.address = self._inside.ctypes.data

    def tensor(self) -> Tensor:
        return torch.from_numpy(self._inside).view(self._dtype).as_strided(self.operand.shape, self.operand.strides)

    def misuse(self) -> str | None:
        """What was written that should not have been."""
        if not all((side == _CANARY).all() for side in self._around):
            return "wrote outside of it"
        if self.operand.tensor is not None and not np.array_equal(self._inside, self._first):
            return "wrote into it"
        return None


def launch(plan: dispatch.Plan, inputs: testing.Inputs, *, shift: int = 0) -> testing.Result:
    """The plan's result; ``shift`` elements move every operand off alignment.  Raises :class:`Misuse` for a write outside of the outputs."""
    problem = plan.problem
    buffers = [None if o is None else _Buffer(o, problem.dtype, shift * DTYPES[problem.dtype]) for o in operands(problem, inputs)]
    plan.launch(*(0 if b is None else b.address for b in buffers))
    for buffer in buffers:
        if buffer is not None and (misuse := buffer.misuse()):
            raise Misuse(f"{plan.implementation}: '{problem}': {buffer.operand.name}: {misuse}")
    side, out = buffers[2], buffers[3]
    assert out is not None
    return testing.Result(out.tensor(), side.tensor() if side is not None and problem.direction == "grad_weight" else None)


def plan_named(implementation: str, problem: ConvProblem, threads: int = 2) -> dispatch.Plan:
    """The plan of this implementation with poisoned workspaces; raises :class:`faltung.dispatch.Unsupported` where it refuses."""
    with config.override(implementation=implementation, poison=True):
        plan = dispatch.plan(problem, "cpu", threads)
    assert plan.implementation == implementation, f"asked for {implementation}, got {plan.implementation}"
    assert plan.problem == problem
    return plan


def equal_bits(left: testing.Result, right: testing.Result) -> bool:
    """Whether two results are the same bits (NaN and the sign of zero included)."""
    return all(torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)) for a, b in zip(left, right, strict=True))


def equal_where_not_finite(left: testing.Result, right: testing.Result) -> bool:
    """Whether NaN and infinities are in the same places of two results, whatever stands elsewhere."""

    def rest(tensor: Tensor) -> Tensor:
        return torch.where(tensor.isfinite(), torch.zeros_like(tensor), tensor)

    return all(torch.allclose(rest(a), rest(b), equal_nan=True) for a, b in zip(left, right, strict=True))


def verify(plan: dispatch.Plan, *, exact: bool = True, bound: float = 0.0, shift: int = 0, seed: int = 1, whole: float | None = None) -> str | None:
    """What is wrong with the plan's results, or None.

    ``exact``: whole numbers must come out exactly; with ``whole``, where all sums are at most that.  ``bound``: the relative L2 error that an algorithm of
    fewer multiplications may have; without one :func:`faltung.testing.error_bound` holds.
    """
    return (_inexact(plan, shift, whole) if exact else None) or deviation(plan, bound=bound, shift=shift, seed=seed)


def _inexact(plan: dispatch.Plan, shift: int, whole: float | None = None) -> str | None:
    problem = plan.problem
    inputs = testing.make_inputs(problem, integers=True)
    wanted = testing.rounded(problem, testing.exact(problem, inputs))
    for got, want in zip(launch(plan, inputs, shift=shift), wanted, strict=True):
        if whole is not None and want.numel() and want.abs().max().item() > whole:
            continue
        if not torch.equal(got, want):
            wrong = (got != want).sum().item()
            largest = (got.double() - want.double()).abs().max().item()
            return f"'{problem}': {wrong} of {got.numel()} sums of whole numbers are off, by up to {largest}; {_facts(plan)}"
    return None


def deviation(plan: dispatch.Plan, *, bound: float = 0.0, shift: int = 0, seed: int = 1) -> str | None:
    """What is wrong with the plan's results for normally distributed numbers, or None."""
    problem = plan.problem
    inputs = testing.make_inputs(problem, seed=seed)
    found, wanted = launch(plan, inputs, shift=shift), testing.exact(problem, inputs)
    # Nobody's error in a type of 16 bits is less than one rounding, and PyTorch takes minutes for some of these problems.
    stock = testing.rounded(problem, wanted) if bound or problem.dtype in ("bf16", "f16") else testing.stock(problem, inputs)
    for got, want, own in zip(found, wanted, stock, strict=True):
        difference = got.double() - want
        if not difference.isfinite().all():
            return f"'{problem}': {(~difference.isfinite()).sum().item()} of {got.numel()} results are not finite; {_facts(plan)}"
        if bound:
            error, limit = (difference.norm() / want.norm().clamp_min(1e-300)).item(), bound
        else:
            error, limit = difference.abs().max().item(), testing.error_bound(want, own)
            if error > limit:
                limit = max(limit, _cancelled(problem, inputs))
        if error > limit:
            return f"'{problem}': error {error:.3g}, allowed {limit:.3g}; {_facts(plan)}"
    return None


def _cancelled(problem: ConvProblem, inputs: testing.Inputs) -> float:
    """Four units in the last place of the root of the sum of squares of a result's terms: where few results cancelled by accident, their own size
    says nothing about the rounding of their terms."""
    squares = testing.Inputs(*(t.double() ** 2 for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))
    largest = max(t.max().item() for t in testing.exact(problem, squares))
    return float(4 * torch.finfo(testing.TORCH_DTYPES[problem.dtype]).eps * largest**0.5)


def _facts(plan: dispatch.Plan) -> str:
    return f"{plan.implementation} {plan.describe()}"


@dataclass
class Outcome:
    """Counts of a sweep."""

    ran: int = 0
    refused: int = 0


def accepted(problems: Iterable[ConvProblem], implementation: str, outcome: Outcome, threads: int = 2) -> Iterator[dispatch.Plan]:
    """Plans of the problems that the implementation takes; both kinds are counted."""
    for problem in problems:
        try:
            plan = plan_named(implementation, problem, threads)
        except dispatch.Unsupported as refusal:
            if not str(refusal):
                raise AssertionError(f"{implementation} refused '{problem}' without a reason") from refusal
            outcome.refused += 1
        else:
            outcome.ran += 1
            yield plan


def sweep(problems: Iterable[ConvProblem], implementation: str, check: Callable[[dispatch.Plan], str | None], threads: int = 2) -> Outcome:
    """Run ``check`` on the plan of every problem that the implementation takes; raises AssertionError with the first failures."""
    outcome, failures = Outcome(), []
    for plan in accepted(problems, implementation, outcome, threads):
        try:
            failure = check(plan)
        except Misuse as misuse:
            failure = str(misuse)
        if failure:
            failures.append(failure)
    assert not failures, f"{len(failures)} of {outcome.ran} failed:\n" + "\n".join(failures[:20])
    return outcome
