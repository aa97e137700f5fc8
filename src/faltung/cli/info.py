"""``faltung info``: the machine, the versions, and the cache of kernels."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import fields

from rich.console import Console
from rich.table import Table

__all__ = ["facts", "info"]


def info() -> None:
    """Print the processor, its instruction set, caches, measured rates, threads, versions, the kernel cache and the GPU."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts():
        table.add_row(name, value)
    Console().print(table)


def facts() -> Iterator[tuple[str, str]]:
    """What ``faltung info`` prints, as names and values."""
    import torch

    from .. import __version__, config
    from ..bench.rows import commit, cpu_name, package_version
    from ..codegen.compile import cache_folder, cache_size
    from ..cpu.target import host_target

    target = host_target()
    yield "processor", cpu_name()
    yield "instruction set", f"{target.isa}: {target.registers} vector registers of {8 * target.vector_bytes} bits, generated for {target.cpu}"
    yield "caches of one core", f"L1 {target.l1 >> 10} KiB, L2 {target.l2 >> 10} KiB"
    yield "rates", _rates(target.lanes("float"))
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
    yield "GPU", _gpu()
    yield "faltung", " ".join(part for part in (__version__, commit()) if part)
    yield "torch", torch.__version__
    for package in ("llvmlite", "triton", "numpy"):
        yield package, package_version(package) or "not installed"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    folder = cache_folder()
    yield "kernel cache", f"{folder}, {cache_size() / (1 << 20):.1f} MiB" if folder else "none: no private folder can be written"
    options = config.current()
    yield "options", ", ".join(f"{option.name}={getattr(options, option.name)}" for option in fields(options) if option.init)


def _rates(lanes: int) -> str:
    """What :mod:`faltung.cpu.machine` measured, for people."""
    from ..cpu.machine import machine

    found = machine()
    core = f"a core: {4e-9 * lanes / found.cycle:.0f} GFLOP/s in float32, reads L2 at {found.near / found.cycle * 1e-9:.0f} GB/s"
    start = f", started in {found.fork * 1e6:.1f} us" if found.fork else ""
    return f"{core}; {found.threads} cores: memory at {found.stream * 1e-9:.0f} GB/s{start}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB, compute capability {properties.major}.{properties.minor}"
