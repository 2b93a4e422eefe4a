"""Quantization: fewer bits per number.

Reading order: `specs` (which leaf gets which spec), `weights` (training on the grid),
`conversion` (float trees to quantized trees). One array's formats and steps are in
`jopt.arrays`.
"""

from jopt.quantization.conversion import quantize as quantize
from jopt.quantization.weights import QuantizeState as QuantizeState
from jopt.quantization.weights import get_scales as get_scales
from jopt.quantization.weights import quantize_weights as quantize_weights
