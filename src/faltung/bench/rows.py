"""One measurement as a row of a CSV file, with everything that is needed to judge it later."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Environment", "Row", "commit", "cpu_name", "environment", "package_version", "read_csv", "write_csv"]


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured.  ``roof_gflops``, ``roof_gbs``: float32 GEMM and copy, measured just before the first row."""

    time: str
    device: str
    isa: str
    threads: int
    roof_gflops: float
    roof_gbs: float
    python: str
    torch: str
    llvmlite: str
    faltung: str
    commit: str


@dataclass(frozen=True)
class Row:
    """One provider on one problem in one format.

    ``status``: ``ok``, ``wrong`` for a result outside ``bound``, ``refused`` where no implementation takes the problem; the last two have no time
    (NaN).  ``error`` is relative to float64, of the whole result or of some channels, as ``reference`` says.  Times are seconds.
    """

    suite: str
    layer: str
    count: int
    problem: str
    direction: str
    dtype: str
    format: str
    provider: str
    implementation: str
    provider_version: str
    status: str
    median: float
    p20: float
    p80: float
    runs: int
    gflops: float
    error: float
    bound: float
    reference: str
    time: str
    device: str
    isa: str
    threads: int
    roof_gflops: float
    roof_gbs: float
    python: str
    torch: str
    llvmlite: str
    faltung: str
    commit: str

    @property
    def key(self) -> str:
        """What rows of one comparison share: the problem without its formats."""
        return " ".join(part for part in self.problem.split() if part not in ("nchw", "nhwc", "wnhwc"))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` to ``path``, replacing it; numbers keep six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_csv` wrote; raises ValueError for a file with other columns."""
    kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(kinds):
            raise ValueError(f"{path} was not written by this release: its columns are {reader.fieldnames}")
        return [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in reader]


def environment() -> Environment:
    """Facts of the machine and the versions; measures the two roofs, which takes about half a second."""
    from .. import __version__
    from ..cpu.target import host_target

    gflops, gbs = _roofs()
    return Environment(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=cpu_name(),
        isa=host_target().isa,
        threads=torch.get_num_threads(),
        roof_gflops=gflops,
        roof_gbs=gbs,
        python=platform.python_version(),
        torch=torch.__version__,
        llvmlite=package_version("llvmlite"),
        faltung=__version__,
        commit=commit(),
    )


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name as the system gives it, with the number of cores that it has in this machine."""
    import os

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the checkout that this package lies in, with a plus sign where files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie inside another project's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _roofs() -> tuple[float, float]:
    """Best GFLOP/s of a float32 matrix product and GB/s (read and written) of a copy far larger than the caches."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    gemm = copy = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        middle = time.perf_counter()
        target.copy_(source)
        gemm, copy = min(gemm, middle - start), min(copy, time.perf_counter() - middle)
    return 2 * 1536**3 / gemm * 1e-9, 2 * source.nbytes / copy * 1e-9


def package_version(package: str) -> str:
    """The installed release of ``package``; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
