"""The CPU engine: works on addresses, shapes and strides, and never imports torch."""

from __future__ import annotations

from ..dispatch import Implementation
from .amx import AMX
from .amx_weight import AMX_WEIGHT
from .columns import COLUMNS
from .depthwise import DEPTHWISE
from .depthwise_winograd import DEPTHWISE_WINOGRAD
from .direct import DIRECT
from .direct_weight import DIRECT_WEIGHT
from .folded import FOLDED
from .gemv import GEMV
from .grouped import GROUPED
from .outer import OUTER
from .planes import PLANES
from .pointwise import POINTWISE
from .taps import TAPS
from .winograd import WINOGRAD
from .winograd_weight import WINOGRAD_WEIGHT

__all__ = ["IMPLEMENTATIONS"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    FOLDED,
    DEPTHWISE_WINOGRAD,
    DEPTHWISE,
    GEMV,
    COLUMNS,
    AMX,
    AMX_WEIGHT,
    TAPS,
    WINOGRAD,
    WINOGRAD_WEIGHT,
    OUTER,
    GROUPED,
    PLANES,
    POINTWISE,
    DIRECT,
    DIRECT_WEIGHT,
)
"""In order of preference."""
