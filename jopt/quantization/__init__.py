"""Quantization: fewer bits per number.

Reading order: `roles` and `specs` (which leaf gets which spec), `state` (what training
on the grid remembers), `learned` (gradients of a clipped grid and of its scale),
`weights` (training on the grid), `conversion` (float trees to quantized trees),
`operands` (what is rounded at a site), `observers` and `calibration` (static ranges),
`learned_ranges`, `arguments` and `fake` (quantization-aware functions), `products`,
`microscaled` and `execute` (codes times codes), `folding` (norms into weights),
`factors` and `input_factors` (numbers per channel), `equalization` and `smoothing`
(factors moved between leaves), `bias_correction`;
`layer_solving`, `layer_report`, `layers` and `post_training` (quantization with
calibration data), each method's matrix in a file of its name, such as `gptq`. One
array's formats and steps are in `jopt.arrays`.
"""

from jopt.quantization.bias_correction import BiasReport as BiasReport
from jopt.quantization.bias_correction import correct_bias as correct_bias
from jopt.quantization.calibration import calibrate as calibrate
from jopt.quantization.conversion import quantize as quantize
from jopt.quantization.equalization import EqualizationReport as EqualizationReport
from jopt.quantization.equalization import equalize as equalize
from jopt.quantization.execute import execute as execute
from jopt.quantization.fake import fake_quantize as fake_quantize
from jopt.quantization.folding import fold_batch_norm as fold_batch_norm
from jopt.quantization.layer_report import QuantizationReport as QuantizationReport
from jopt.quantization.post_training import awq as awq
from jopt.quantization.post_training import gptq as gptq
from jopt.quantization.post_training import rtn as rtn
from jopt.quantization.smoothing import Smoothed as Smoothed
from jopt.quantization.smoothing import SmoothingReport as SmoothingReport
from jopt.quantization.smoothing import smooth as smooth
from jopt.quantization.state import QuantizeState as QuantizeState
from jopt.quantization.state import get_scales as get_scales
from jopt.quantization.weights import quantize_weights as quantize_weights
