"""Checks and times the CUDA engine on this machine's GPU, in under nine minutes:

    PYTHONPATH=src python benchmarks/device.py

1. Checks: the problems of tests/cases.py, every direction, both formats, types in turns, on every implementation that takes them, against the float64
   oracle on whole numbers (exact) and on random ones (twice stock's error); then tensors beyond 2^31 elements.
2. compute-sanitizer on a few problems, where it is installed.
3. Times: the rows below in each direction, type and format, with our samples and stock's (``cudnn.benchmark``) in turns, the second-level cache
   overwritten before each.  A row whose result is wrong has no time.

Kernels compile in worker processes, which share Triton's cache on disk; one whose context died starts itself anew behind the problem that killed it.
Results go to benchmarks/results/cuda.csv, failures to benchmarks/results/cuda-failures.txt; a summary is printed.  ``--tune SECONDS`` first
searches configurations for the rows, and writes every candidate's time to cuda-tuning.csv; ``--quick`` takes every tenth problem.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from device_checks import CANDIDATES, TORCH, in_workers, ours_call, precise, random_inputs, sanitize, stock_call, tasks, timed_problems  # noqa: E402
from faltung import dispatch, testing  # noqa: E402
from faltung.problem import DIRECTIONS, FORMATS, ConvProblem  # noqa: E402

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Row:
    """One provider on one problem; times are seconds, ``floor`` what measured copy and matrix rates allow, ``launch`` the host's time for a call."""

    problem: str
    direction: str
    dtype: str
    format: str
    provider: str
    implementation: str
    config: str
    status: str
    median: float
    p20: float
    p80: float
    runs: int
    floor: float
    launch: float
    error: float
    bound: float
    device: str
    torch: str
    triton: str
    cudnn: str
    commit: str
    time: str


# --- times --------------------------------------------------------------------------------------------------------------------------------------


def interleaved(calls: Sequence[Callable[[], object]], flush: Tensor, budget: float = 0.06, least: int = 7, most: int = 41) -> list[list[float]]:
    """Samples of each call, taken in turns."""
    from faltung.cuda.tuner import sample

    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    samples: list[list[float]] = [[] for _ in calls]
    while len(samples[0]) < least or (sum(map(sum, samples)) < budget * len(calls) and len(samples[0]) < most):
        for taken, call in zip(samples, calls):
            taken.append(sample(call, flush))
    return samples


def launch_seconds(call: Callable[[], object]) -> float:
    """The host's time for one call, with an idle device in front of it."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates() -> tuple[float, dict[str, float]]:
    """Bytes a second of a copy, and operations a second of matrix products by type: measured."""
    flush = torch.empty(1 << 27, dtype=torch.int32, device="cuda")
    source, target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"), torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    ((*copies,),) = interleaved([lambda: target.copy_(source)], flush)
    found = {}
    for dtype in ("bf16", "f16", "f32"):
        a, b = (torch.randn(8192, 8192, device="cuda").to(TORCH[dtype]) for _ in range(2))
        previous = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        ((*products,),) = interleaved([lambda a=a, b=b: a @ b], flush)  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = previous
        found[dtype] = 2 * 8192**3 / min(products)
    return 2 * source.numel() / min(copies), found


def facts() -> dict[str, str]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    device = torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit,
        "time": now,
    }


def time_rows(gates: dict[str, dict[str, Any]], dtypes: tuple[str, ...], deadline: float) -> list[Row]:
    """Ours and stock on every problem that passed its gate, until the deadline."""
    flush = torch.empty(1 << 27, dtype=torch.int32, device="cuda")
    bandwidth, operations = rates()
    print(f"copy {bandwidth / 1e12:.2f} TB/s; matrix products " + ", ".join(f"{n} {v / 1e12:.0f} TFLOP/s" for n, v in operations.items()), flush=True)
    common, rows = facts(), []
    for problem in timed_problems(dtypes):
        if time.time() > deadline:
            print("out of time: the remaining rows are left out", flush=True)
            break
        outcome = gates.get(str(problem), {"failures": ["not reached"]})
        floor = max(problem.bytes() / bandwidth, problem.flops() / operations[problem.dtype])
        plan = dispatch.plan(problem, "cuda")
        settings = str(plan.describe().get("config", ""))
        inputs = random_inputs(problem)
        calls = [ours_call(problem, inputs), stock_call(problem, inputs)]
        status = "ok" if not outcome["failures"] else "wrong" if "error" in outcome else "failed"
        samples = interleaved(calls, flush) if status == "ok" else [[math.nan], interleaved(calls[1:], flush)[0]]
        for provider, call, taken in zip(("faltung", "stock"), calls, samples):
            mine = provider == "faltung"
            ordered = sorted(taken)
            rows.append(
                Row(
                    str(problem), problem.direction, problem.dtype, problem.format, provider, plan.implementation if mine else "cudnn",
                    settings if mine else "", status if mine else "ok", statistics.median(taken), ordered[len(ordered) // 5],
                    ordered[-1 - len(ordered) // 5], len(taken), floor, launch_seconds(call) if status == "ok" else math.nan,
                    outcome.get("error", math.nan), outcome.get("bound", math.nan), **common,
                )
            )  # fmt: skip
        ours, theirs = rows[-2:]
        print(f"{ours.problem:68} {ours.implementation:20} {ours.median * 1e3:8.3f} ms {ours.status:6} stock {theirs.median * 1e3:8.3f} ms "
              f"x{theirs.median / ours.median:6.2f} floor x{ours.median / floor:5.1f} launch {ours.launch * 1e6:5.0f} us", flush=True)  # fmt: skip
        del inputs, calls
    return rows


def tune_rows(dtypes: tuple[str, ...], deadline: float) -> None:
    """Search configurations for the timed problems, whose kernels worker processes compile first; every candidate goes to cuda-tuning.csv."""
    in_workers("compile", 0.55 * (deadline - time.time()), 1, dtypes, RESULTS)
    with (RESULTS / "cuda-tuning.csv").open("w", newline="", encoding="utf-8", buffering=1) as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("problem", "implementation", "config", "seconds", "error", "bound", "failure"))
        _tune_rows(timed_problems(dtypes), lines, deadline)
    dispatch.clear()


def _tune_rows(problems: Sequence[ConvProblem], lines: Any, deadline: float) -> None:
    from faltung.cuda import tuner

    for problem in problems:
        if time.time() > deadline:
            break
        inputs = random_inputs(problem)
        want, own = precise(problem, inputs)[0], stock_call(problem, inputs)()[0]
        side = inputs.bias if problem.epilogue.bias else None
        choice, measured = tuner.tune(problem, (want.double(), testing.error_bound(want.double(), own)), (*inputs.read_by(problem), side), limit=CANDIDATES)
        lines.writerows((problem, m.implementation, m.config, m.seconds, m.error, m.bound, m.failure) for m in measured)
        wrong = [m for m in measured if m.failure]
        print(f"{problem}: {choice}; {len(measured)} tried, {len(wrong)} rejected" + "".join(f"\n    {m}" for m in wrong[:3]), flush=True)


def summarize(rows: list[Row]) -> None:
    """Geometric means of stock's time over ours, by type, direction and format, the slowest rows, and stock's better format."""
    pairs = [(a, b) for a, b in zip(rows[::2], rows[1::2]) if a.status == "ok"]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for direction in DIRECTIONS:
            for fmt in FORMATS:
                ratios = [b.median / a.median for a, b in pairs if (a.dtype, a.direction, a.format) == (dtype, direction, fmt)]
                if ratios:
                    mean = math.exp(statistics.fmean(map(math.log, ratios)))
                    print(f"{dtype} {direction:11} {fmt}: {mean:5.2f} times stock over {len(ratios)} rows, least {min(ratios):.2f}")
    best: dict[str, float] = {}
    for _, theirs in pairs:
        key = theirs.problem.replace("nhwc", "nchw")
        best[key] = min(best.get(key, math.inf), theirs.median)
    against = [best[a.problem.replace("nhwc", "nchw")] / a.median for a, _ in pairs]
    if against:
        print(f"against stock's better format: {math.exp(statistics.fmean(map(math.log, against))):.2f} times over {len(against)} rows")
    for ours, theirs in sorted(pairs, key=lambda pair: pair[1].median / pair[0].median)[:12]:
        print(f"slowest: {theirs.median / ours.median:5.2f} {ours.problem} {ours.implementation} {ours.config}")


def write(rows: list[Row]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    if rows:
        with (RESULTS / "cuda.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=510, help="for everything")
    parser.add_argument("--dtypes", default="bf16,f32", help="types that are timed")
    parser.add_argument("--quick", action="store_true", help="every tenth problem of the checks")
    parser.add_argument("--tune", type=float, default=0, metavar="SECONDS", help="search configurations first, for so long")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-sanitizer", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    begin, dtypes, step = time.time(), tuple(arguments.dtypes.split(",")), 10 if arguments.quick else 1
    torch.backends.cudnn.benchmark = True
    print(f"{facts()} python {platform.python_version()}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    if not arguments.skip_checks:
        for kind, share in (("small", 0.34), ("large", 0.08)):
            outcomes = in_workers(kind, share * arguments.seconds, step, dtypes, RESULTS)
            wrong = [failure for outcome in outcomes.values() for failure in outcome["failures"]]
            failures += wrong
            print(
                f"{kind}: {len(outcomes)} of {len(tasks(kind, step, dtypes))} problems checked, {len(wrong)} failures, {time.time() - begin:.0f} s", flush=True
            )
        if not arguments.skip_sanitizer:
            print(sanitize(0.08 * arguments.seconds), flush=True)
    if arguments.tune:
        tune_rows(dtypes, time.time() + arguments.tune)
    gates = in_workers("gate", 0.2 * arguments.seconds, step, dtypes, RESULTS)
    failures += [failure for outcome in gates.values() for failure in outcome["failures"]]
    print(f"gate: {len(gates)} of {len(timed_problems(dtypes))} rows, {time.time() - begin:.0f} s", flush=True)
    rows = time_rows(gates, dtypes, max(begin + arguments.seconds + arguments.tune, time.time() + 60))
    write(rows)
    for file in RESULTS.glob("*.jsonl"):
        file.unlink()
    (RESULTS / "cuda-failures.txt").write_text("\n".join(failures) + ("\n" if failures else ""), encoding="utf-8")
    for failure in failures[:40]:
        print(f"FAILED {failure}")
    summarize(rows)
    print(f"{len(failures)} failures; {time.time() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
