"""Quantization: fewer bits per number.

Reading order: `specs` (which leaf gets which spec), `state` (what training on the grid
remembers), `learned` (gradients of a clipped grid and of its scale), `weights`
(training on the grid), `conversion` (float trees to quantized trees). One array's
formats and steps are in `jopt.arrays`.
"""

from jopt.quantization.conversion import quantize as quantize
from jopt.quantization.state import QuantizeState as QuantizeState
from jopt.quantization.state import get_scales as get_scales
from jopt.quantization.weights import quantize_weights as quantize_weights
