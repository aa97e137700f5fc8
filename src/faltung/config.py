"""Options, from the environment and by context manager.

``config.override(precision="strict")`` holds inside its ``with`` block and the threads or tasks that copy its context; a ``FALTUNG_*``
environment variable sets the start value of the option of that name (``FALTUNG_PRECISION=strict``).  ``config.precision`` reads the option in
force, and assigning to it changes it for the whole process, as :func:`set_options` does.
"""

from __future__ import annotations

import difflib
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["Options", "applied", "current", "from_environment", "override", "set_options"]

_CHOICES: dict[str, tuple[str, ...]] = {"precision": ("default", "strict"), "engine": ("auto", "cpu", "cuda")}


_tokens: dict[tuple[Any, ...], int] = {}


@dataclass(frozen=True)
class Options:
    """Every option with its start value.

    precision: ``strict`` allows direct algorithms only; ``default`` also Winograd's, within its stated bound; in float64 with transforms that keep whole
        numbers exact.
    reproducible: the same bits for any number of threads and any batch size.
    autotune: on a CPU, measure a problem's implementations in its first call and keep the fastest on disk; not where results must be reproducible.
    implementation: the name of the only implementation allowed, or None for the ordered list.
    engine: ``auto`` follows the tensors' device.
    cache_dir: folder of the compiled kernels; None for the platform's cache folder, an empty text for no cache on disk.
    cache_limit_mb: bound on the size of that folder, in MiB.
    poison: fill workspaces with NaN before use (for tests).
    """

    precision: str = "default"
    reproducible: bool = False
    autotune: bool = False
    implementation: str | None = None
    engine: str = "auto"
    cache_dir: str | None = None
    cache_limit_mb: int = 512
    poison: bool = False
    token: int = field(init=False, repr=False, compare=False)
    """A number that equal options share, for keys of caches on the path of every call: cheaper to hash than the options."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"faltung option {name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for option in fields(self):
            if option.init:
                _check_kind(option.name, option.default, getattr(self, option.name))
        values = tuple(getattr(self, option.name) for option in fields(self) if option.init)
        object.__setattr__(self, "token", _tokens.setdefault(values, len(_tokens)))


def _check_kind(name: str, default: Any, value: Any) -> None:
    """Raise ValueError for a value of another kind than the option's start value: ``reproducible="no"`` would count as true."""
    if isinstance(default, bool):
        good, kind = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        good, kind = isinstance(value, int) and value >= 0, "a whole number, not negative"
    else:
        good, kind = value is None or isinstance(value, (str, os.PathLike)), "a text or None"
    if not good:
        raise ValueError(f"faltung option {name} must be {kind}; got {value!r}")


def from_environment(environment: Mapping[str, str]) -> Options:
    """Options as the ``FALTUNG_*`` variables of ``environment`` set them.  Raises ValueError for a value of the wrong form."""
    values: dict[str, Any] = {}
    for option in fields(Options):
        variable = "FALTUNG_" + option.name.upper()
        text = environment.get(variable)
        if text is None or not option.init:
            continue
        if isinstance(option.default, bool):
            if text.lower() not in ("0", "1", "true", "false"):
                raise ValueError(f"{variable} must be 0 or 1; got {text!r}")
            values[option.name] = text.lower() in ("1", "true")
        elif isinstance(option.default, int):
            try:
                values[option.name] = int(text)
            except ValueError:
                raise ValueError(f"{variable} must be a whole number; got {text!r}") from None
        else:
            values[option.name] = text
    return Options(**values)


_options: ContextVar[Options] = ContextVar("faltung_options")
_default = from_environment(os.environ)


def current() -> Options:
    """The options in force here."""
    return _options.get(_default)


def set_options(**values: Any) -> None:
    """Change options for the whole process, outside every ``override``."""
    global _default
    _default = replace(_default, **values)


@contextmanager
def applied(options: Options) -> Iterator[Options]:
    """These options in force inside the ``with`` block."""
    token = _options.set(options)
    try:
        yield options
    finally:
        _options.reset(token)


@contextmanager
def override(**values: Any) -> Iterator[Options]:
    """Options changed inside the ``with`` block; raises TypeError for an unknown name, ValueError for an unknown choice."""
    with applied(replace(current(), **values)) as options:
        yield options


_NAMES = frozenset(option.name for option in fields(Options) if option.init)


class _Config(types.ModuleType):
    """The module with its options as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in _NAMES:
            return getattr(current(), name)
        raise _unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES:
            set_options(**{name: value})
        elif name in self.__dict__ or name.startswith("_"):  # what the module holds, and what Python's import writes
            super().__setattr__(name, value)
        else:
            raise _unknown(name)


def _unknown(name: str) -> AttributeError:
    close = difflib.get_close_matches(name, sorted(_NAMES), 1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return AttributeError(f"faltung.config has no option {name!r}{meant} There are {', '.join(sorted(_NAMES))}")


sys.modules[__name__].__class__ = _Config
