"""The CUDA engine: kernels written in Triton, an optional import.  Without Triton the engine has no implementations."""

from __future__ import annotations

import importlib.util

from ..dispatch import Implementation

__all__ = ["IMPLEMENTATIONS"]


def _implementations() -> tuple[Implementation, ...]:
    if importlib.util.find_spec("triton") is None:
        return ()
    from .banded import BANDED
    from .banded_weight import BANDED_WEIGHT
    from .depthwise import DEPTHWISE
    from .depthwise_weight import DEPTHWISE_WEIGHT
    from .folded import FOLDED
    from .igemm import IGEMM
    from .igemm_weight import IGEMM_WEIGHT
    from .packed import IGEMM_PACKED, IGEMM_PACKED_WEIGHT
    from .stem import STEM, STEM_WEIGHT
    from .tuner import TUNED

    depthwise = BANDED, BANDED_WEIGHT, DEPTHWISE, DEPTHWISE_WEIGHT
    return TUNED, FOLDED, *depthwise, STEM, STEM_WEIGHT, IGEMM_PACKED, IGEMM_PACKED_WEIGHT, IGEMM, IGEMM_WEIGHT


IMPLEMENTATIONS: tuple[Implementation, ...] = _implementations()
"""In order of preference."""
