"""What runs for a convolution, and why nothing else does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import config, dispatch, layout
from .arguments import Arguments, check_problem
from .functional import reason_for_stock, resolve
from .nn import Conv2d, LazyConv2d, padding_of
from .prepared import DTYPE_NAMES, Prepared, engine_for, kind_of, prepare
from .problem import DIRECTIONS, ConvProblem, Direction

__all__ = ["Explanation", "ProblemExplanation", "explain"]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class ProblemExplanation:
    """One convolution in one direction.

    ``implementation``: who computes it, ``facts``: what its plan says of itself (kernel, tile, workspace, ...), ``refusals``: (implementation, reason) of
    those asked before, ``measured_seconds``: the median of a few runs, where asked for, ``slower``: (candidate, verdict) where the choice was measured.
    ``implementation`` is None where nobody launches a kernel or PyTorch computes it; ``reason`` tells.
    """

    problem: ConvProblem | None
    engine: str
    implementation: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    refusals: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    measured_seconds: float | None = None
    layer: str = ""
    slower: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        title = f"{self.layer}: " if self.layer else ""
        if self.implementation is None:
            return f"{title}{self.problem or 'convolution'}\n  {self.engine}: {self.reason}"
        lines = [f"{title}{self.problem}", f"  {self.engine} implementation: {self.implementation}"]
        lines += [f"    {name}: {_text(name, value)}" for name, value in self.facts.items()]
        if self.measured_seconds is not None:
            assert self.problem is not None
            rate = self.problem.flops() / self.measured_seconds / 1e9
            lines.append(f"    measured: {_seconds(self.measured_seconds)}, {rate:.3g} GFLOP/s")
        lines += [f"  {name} refused: {reason}" for name, reason in self.refusals]
        lines += [f"  {name} was slower: {verdict}" for name, verdict in self.slower]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The explanation of every convolution asked about, in every direction.  ``str(explanation)`` is for people."""

    parts: tuple[ProblemExplanation, ...]

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts) if self.parts else "no convolution"

    def __repr__(self) -> str:
        return str(self)


def explain(
    module_or_problem: torch.nn.Module | ConvProblem | str,
    input: Tensor | None = None,  # noqa: A002
    *,
    measure: bool = False,
) -> Explanation:
    """Which implementation computes a convolution, with which kernel and tile, and why the others refused.

    Takes a problem, or the text of one, for one direction; a ``torch.nn.Conv2d`` and an input for it, for every direction; or a model and an input,
    which is called once with it, for every ``torch.nn.Conv2d`` in the model.  ``measure`` also times each on random operands.

    Raises TypeError where a module comes without input, ValueError for a problem that is none, Unsupported where no implementation accepts.
    """
    if isinstance(module_or_problem, str):
        module_or_problem = ConvProblem.parse(module_or_problem)
    if isinstance(module_or_problem, ConvProblem):
        check_problem(module_or_problem)
        engine = "cpu" if config.current().engine == "auto" else config.current().engine
        return Explanation((_explain_problem(module_or_problem, torch.device(engine), measure),))
    if input is None:
        raise TypeError("explain() of a module needs an input for it, as in explain(conv, torch.randn(1, 3, 224, 224))")
    if isinstance(module_or_problem, torch.nn.Conv2d):
        return Explanation(_explain_layer("", module_or_problem, input, measure))
    parts: list[ProblemExplanation] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: parts.extend(_explain_layer(name, module, inputs[0], measure)))
        for name, module in module_or_problem.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            module_or_problem(input)
    finally:
        for hook in hooks:
            hook.remove()
    return Explanation(tuple(parts))


def _explain_layer(layer: str, module: torch.nn.Conv2d, x: Tensor, measure: bool) -> tuple[ProblemExplanation, ...]:
    weight, bias = module.weight, module.bias
    reason = reason_for_stock(x, weight, bias)
    if reason is not None:
        return (ProblemExplanation(None, "PyTorch", None, reason=f"PyTorch's own convolution: {reason}", layer=layer),)
    form = resolve(x, weight, bias, module.stride, padding_of(module), module.dilation, module.groups, module.padding_mode)
    call = prepare(x, weight, bias, form)
    if call.problem.empty:
        return (replace(_explain_problem(call.problem, x.device, measure), layer=layer),)
    explained = []
    for direction in DIRECTIONS:
        problem = call.problem.with_direction(direction, bias=bias is not None and direction != "grad_input")
        frozen = direction == "forward" and isinstance(module, (Conv2d, LazyConv2d)) and module.frozen
        explained.append(replace(_explain_problem(problem, x.device, measure, frozen), layer=layer))
    return tuple(explained)


def _explain_problem(problem: ConvProblem, device: torch.device, measure: bool, frozen: bool = False) -> ProblemExplanation:
    if problem.empty:
        return ProblemExplanation(problem, "faltung", None, reason="without elements: nothing is launched")
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    engine = engine_for(device)
    decision = dispatch.decide(problem, engine, threads)
    plan = decision.plan
    facts = plan.describe_frozen() if frozen and isinstance(plan, dispatch.Freezable) else plan.describe()
    if decision.seconds is not None:
        facts["tuned_seconds"] = decision.seconds
    measured = _measure(problem, device, threads, frozen) if measure else None
    return ProblemExplanation(problem, engine, plan.implementation, facts, decision.refusals, measured_seconds=measured, slower=decision.slower)


def _measure(problem: ConvProblem, device: torch.device, threads: int, frozen: bool) -> float:
    dtype = _DTYPES[problem.dtype]

    def random(shape: tuple[int, ...], fmt: Any) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).as_strided(shape, layout.strides_of(shape, fmt))

    x, y = random(problem.input_shape, problem.format), random(problem.output_shape, problem.format)
    w, bias = random(problem.weight_shape, problem.weight_format), torch.randn(problem.k, device=device).to(dtype) if problem.epilogue.bias else None
    form = Arguments(problem.stride, problem.padding, problem.dilation, problem.g, problem.padding_mode)
    call: Prepared = kind_of(device)(problem.with_direction("forward", bias=bias is not None), form, dtype, device, threads)
    runs: dict[Direction, Callable[[], Any]] = {
        "forward": lambda: call.forward(x, w, bias),
        "grad_input": lambda: call.grad_input(y, w),
        "grad_weight": lambda: call.grad_weight(x, y, bias is not None),
    }
    kept = call.freeze(w, bias) if frozen else None
    if kept is not None:
        runs["forward"] = lambda: call.forward_frozen(kept, x, w, bias)
    run = runs[problem.direction]
    times: list[float] = []
    run()
    while len(times) < 5 or (sum(times) < 0.2 and len(times) < 1000):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.get_device_module(device.type).synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _text(name: str, value: Any) -> str:
    if name.endswith("seconds") and isinstance(value, float):
        return _seconds(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _seconds(value: float) -> str:
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * scale:.3g} {unit}"
    return f"{value:.3g} s"
