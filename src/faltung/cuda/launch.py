"""A kernel's launch with everything settled that a plan knows: the grid, the scalars, the constants.

Triton's own way from a call to the driver binds and specializes each argument anew and looks the kernel up under the text of the outcome.  Here the scalars
never change, so what decides which kernel is compiled is a handful of facts: the device, the tensors' types, whether their addresses are multiples of 16,
PyTorch's switch for float32 products, Triton's debug mode.  The first call with given facts goes Triton's way; what it compiled is then started directly,
with the arguments that ``JITFunction.run`` gives it.  How a compiled kernel is started is no public interface, but the same in the versions named below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .runtime import INTERPRETED, fp32_precision

__all__ = ["Launch"]

_VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
_KNOWN = (3, 6) <= _VERSION <= (3, 8) and not INTERPRETED
_RUN = JITFunction.run


def _unhooked(hook: Any) -> bool:
    """Whether a hook of Triton's does nothing: None, or a chain without links."""
    return hook is None or not getattr(hook, "calls", True)


class Launch:
    """Called with the tensors, which are the kernel's leading parameters; ``scalars`` follow them in order.

    ``constants`` are the kernel's constants and Triton's options.  A ``PRECISION`` of None stands for what PyTorch's switches say at each call.
    """

    __slots__ = ("_grid", "_started", "_switched", "constants", "grid", "kernel", "scalars")

    def __init__(self, kernel: Any, grid: tuple[int, ...], scalars: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.scalars, self.constants = kernel, grid, scalars, constants
        self._grid = (*grid, 1, 1)[:3]
        self._switched = constants.get("PRECISION", "") is None
        self._started: dict[tuple[Any, ...], tuple[CompiledKernel, Callable[..., None], Any, Any, tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        precision = fp32_precision() if self._switched else ""
        knobs = triton.knobs.runtime
        # whoever watches launches, or replaced what launches, sees them as before
        if not (
            _KNOWN and JITFunction.run is _RUN and _unhooked(knobs.launch_enter_hook) and _unhooked(knobs.launch_exit_hook)
            and getattr(knobs, "add_stages_inspection_hook", None) is None and not self.kernel.pre_run_hooks
        ):  # fmt: skip
            self._ordinary(tensors, precision)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, precision, knobs.debug, *[t.dtype for t in tensors], *[t.data_ptr() % 16 == 0 for t in tensors])
        found = self._started.get(key)
        if found is None:
            self._keep(key, self._ordinary(tensors, precision), precision, len(tensors))
            return
        _, run, function, metadata, rest = found
        first, second, third = self._grid
        run(first, second, third, driver.get_current_stream(device), function, metadata, None, None, None, *tensors, *rest)

    def _ordinary(self, tensors: tuple[Tensor, ...], precision: str) -> Any:
        """Triton's way; what it compiled."""
        constants = {**self.constants, "PRECISION": precision} if self._switched else self.constants
        return self.kernel[self.grid](*tensors, *self.scalars, **constants)

    def _keep(self, key: tuple[Any, ...], compiled: Any, precision: str, tensors: int) -> None:
        """Remember what was started: not what is still being compiled, nor AMD's, for which the sizes of the tensors' memory count as well."""
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            names = [parameter.name for parameter in self.kernel.params]
            values = {**dict(zip(names[tensors:], self.scalars)), **self.constants}
            if self._switched:
                values["PRECISION"] = precision
            rest = tuple(values[name] for name in names[tensors:])
            # the kernel itself as well: without it, Triton would unload the function
            self._started[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
