"""Measured choices on disk: one JSON file for each machine or device, in the folder of compiled kernels (``config.cache_dir``).

A file's name carries what the times depend on (processor or GPU, versions), its keys are problem strings.  A file that is corrupt, foreign or unreadable is a
store without entries.  Files are replaced by rename, under a lock, with what other processes added meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ChoiceStore", "store_path"]

_LOCK_SECONDS = 10.0
Record = dict[str, Any]


def store_path(engine: str, facts: str) -> Path | None:
    """The file of an engine's choices where ``facts`` hold, or None where nothing can be kept on disk."""
    try:
        from .codegen.compile import cache_folder
    except ImportError:  # a machine for CUDA alone may lack what the CPU engine needs
        return None
    folder = cache_folder()
    return None if folder is None else folder / f"{engine}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


class ChoiceStore:
    """Records by key; ``path`` says where they are kept now, None for memory alone."""

    def __init__(self, path: Callable[[], Path | None]) -> None:
        self._path = path
        self._loaded: dict[Path, dict[str, Record]] = {}

    def lookup(self, key: str) -> Record | None:
        """The record of this key, None where there is none."""
        return self._records(self._path()).get(key)

    def remember(self, key: str, record: Record) -> None:
        """Keep a record, on disk where that is possible."""
        path = self._path()
        self._records(path)[key] = record
        if path is None:
            return
        from filelock import FileLock, Timeout

        # a store that cannot be written costs the next process its choices, never a call
        with contextlib.suppress(OSError, Timeout), FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            records = {**_read(path), key: record}
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(dict(sorted(records.items())), file, indent=1)
            Path(name).replace(path)

    def clear(self) -> None:
        """Forget what was read from disk."""
        self._loaded.clear()

    def _records(self, path: Path | None) -> dict[str, Record]:
        place = path or Path()
        if place not in self._loaded:
            self._loaded[place] = {} if path is None else _read(path)
        return self._loaded[place]


def _read(path: Path) -> dict[str, Record]:
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}
