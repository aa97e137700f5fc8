"""The CPU engine: works on addresses, shapes and strides, and never imports torch."""

from __future__ import annotations

from ..dispatch import Implementation
from .direct import DIRECT
from .direct_weight import DIRECT_WEIGHT
from .folded import FOLDED
from .pointwise import POINTWISE

__all__ = ["IMPLEMENTATIONS"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (FOLDED, POINTWISE, DIRECT, DIRECT_WEIGHT)
"""In order of preference."""
