"""A drop-in ``torch.nn.Conv2d`` that runs on its own kernels.

``faltung.Conv2d`` and ``faltung.conv2d`` are what ``torch.nn.Conv2d`` and ``torch.nn.functional.conv2d`` are; :func:`convert` puts the module into a
model, :func:`accelerate` the function under code that calls PyTorch's, :func:`explain` tells what runs and why.
"""

from . import config
from .convert import ConversionEntry, ConversionReport, accelerate, conversion_report, convert
from .dispatch import Unsupported
from .explain import Explanation, explain
from .functional import conv2d, conv2d_output_size
from .nn import Conv2d, LazyConv2d, freeze, unfreeze
from .problem import ConvProblem

__all__ = [
    "Conv2d",
    "ConvProblem",
    "ConversionEntry",
    "ConversionReport",
    "Explanation",
    "LazyConv2d",
    "Unsupported",
    "accelerate",
    "config",
    "conv2d",
    "conv2d_output_size",
    "conversion_report",
    "convert",
    "explain",
    "freeze",
    "unfreeze",
]

__version__ = "0.1.0"
