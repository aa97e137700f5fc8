"""IR text to object code, cached on disk.

The key of an object is complete: the IR text itself (so every byte of the generators' output), LLVM's version, processor and features.
A cached file carries a checksum; one that is corrupt, foreign or unreadable is a miss.  The folder is private to its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import llvmlite
import llvmlite.binding as llvm
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from .. import config

if TYPE_CHECKING:
    from ..cpu.target import Target

__all__ = ["CacheStatistics", "assembly", "cache_folder", "cache_size", "compile_object", "host_cpu", "object_key", "statistics"]

_MAGIC = b"faltung1"
_SUFFIX = ".kernel"
_LOCK_SECONDS = 60.0
_ENTRIES_A_WRITE = 16
"""Entries of the folder that a write looks at on average: 0.2 ms, where compiling takes 15."""


@dataclass
class CacheStatistics:
    """Counts of this process: objects found on disk, compiled, and found damaged."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0


statistics = CacheStatistics()
_unseen_writes: dict[Path, int] = {}
"""Writes to a folder until it is looked through again."""
_compiler = threading.RLock()  # LLVM's global context is not safe to share between threads


@lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def host_cpu() -> tuple[str, str]:
    """LLVM's name of the host's processor and its features, without the preference for short vectors."""
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False
    return llvm.get_host_cpu_name(), features.flatten()


def _machine(target: Target) -> llvm.TargetMachine:
    _initialize()
    # Position-independent: an object's constants lie beside its code, and functions of other objects, at any distance, are called through the linker's stubs.
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="small", jit=False
    )


def _parse(text: str, target: Target) -> llvm.ModuleRef:
    module = llvm.parse_assembly(f'target triple = "{target.triple}"\n{text}')
    module.verify()
    return module


def assembly(text: str, target: Target) -> str:
    """The assembly that ``text`` compiles to, for reading and for counting instructions."""
    with _compiler:
        return str(_machine(target).emit_assembly(_parse(text, target)))


def _compile(text: str, target: Target) -> bytes:
    with _compiler:
        return bytes(_machine(target).emit_object(_parse(text, target)))


def object_key(text: str, target: Target) -> str:
    """What an object is known by: a digest of all that its code depends on."""
    parts = (_MAGIC.decode(), llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)), target.triple, target.cpu, target.features, text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cache_folder() -> Path | None:
    """The folder of compiled kernels, to which nobody but its owner may write; None where there is none or it is not safe to use.

    Where others may write to the folder that was asked for (``/tmp``, a group's folder), it is one of our own in there.
    """
    wanted = config.current().cache_dir
    if wanted == "":
        return None
    folder = Path(wanted) if wanted is not None else user_cache_path("faltung", appauthor=False) / "kernels"
    return _usable(str(folder))


@lru_cache(maxsize=16)
def _usable(name: str) -> Path | None:
    folder = Path(name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_mode & 0o022:  # its mode is somebody's choice: to take /tmp from everybody else would break the machine
            folder /= f"faltung-{os.getuid()}" if hasattr(os, "getuid") else "faltung"
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()  # of a link in there, which may be another's, and is no folder
        safe = stat.S_ISDIR(facts.st_mode) and not facts.st_mode & 0o022 and (not hasattr(os, "getuid") or facts.st_uid == os.getuid())
        return folder if safe and os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None
    except OSError:
        return None


def cache_size() -> int:
    """Bytes of the compiled kernels on disk."""
    folder = cache_folder()
    return sum(size for _, size, _ in _entries(folder)) if folder else 0


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    entries = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            entries.append((facts.st_mtime, facts.st_size, path))
    return sorted(entries)


def _read(path: Path) -> bytes | None:
    """The object in a cache file, None where the file is missing or not what was written."""
    try:
        facts = path.stat()
        if hasattr(os, "getuid") and facts.st_uid != os.getuid():
            return None
        content = path.read_bytes()
    except OSError:
        return None
    header = len(_MAGIC) + 32
    payload = content[header:]
    if not payload or content[: len(_MAGIC)] != _MAGIC or content[len(_MAGIC) : header] != hashlib.sha256(payload).digest():
        statistics.corrupt += 1
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return payload


def _write(path: Path, payload: bytes) -> None:
    """Write by rename, so that a reader sees the whole file or none; a full or read-only disk is no error."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(payload).digest() + payload)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _shrink(path.parent)


def _shrink(folder: Path) -> None:
    """Remove the objects used longest ago until the folder is within its bound.

    A folder of thousands is looked through at some of the writes only, else that would take longer than compiling: the bound may be exceeded by a share.
    """
    left = _unseen_writes.get(folder, 0)
    if left > 0:
        _unseen_writes[folder] = left - 1
        return
    limit = config.current().cache_limit_mb << 20
    entries = _entries(folder)
    _unseen_writes[folder] = len(entries) // _ENTRIES_A_WRITE
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
        total -= size


def compile_object(text: str, target: Target) -> bytes:
    """The object code of a module of IR text for ``target``, from the cache on disk where it is there.

    Raises RuntimeError, with LLVM's message, for text that LLVM refuses (a defect of a generator).
    """
    folder = cache_folder()
    if folder is None:
        statistics.misses += 1
        return _compile(text, target)
    path = folder / (object_key(text, target) + _SUFFIX)
    found = _read(path)
    if found is None:
        lock = FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS)
        # A lock that cannot be had costs a compilation, never a failure.
        with contextlib.suppress(Timeout, OSError), lock:
            found = _read(path)
            if found is None:
                statistics.misses += 1
                found = _compile(text, target)
                _write(path, found)
                return found
        if found is None:
            statistics.misses += 1
            return _compile(text, target)
    statistics.hits += 1
    return found
