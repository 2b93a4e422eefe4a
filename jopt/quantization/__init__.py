"""Quantization: fewer bits per number.

Reading order: `roles` and `specs` (which leaf gets which spec), `state` (what training
on the grid remembers), `learned` (gradients of a clipped grid and of its scale),
`weights` (training on the grid), `conversion` (float trees to quantized trees),
`operands` (what is rounded at a site), `observers` and `calibration` (static ranges),
`learned_ranges`, `arguments` and `fake` (quantization-aware functions), `products`,
`microscaled` and `execute` (codes times codes), `folding` (norms into weights);
`low_rank`, `layer_scales`, `layer_solving`, `layer_report`, `layers` and
`post_training` (quantization with calibration data), each method's matrix in a file of
its name, such as `gptq`; `rotation_plan` and `rotation` (weights and activations
without outliers). One array's formats and steps are in `jopt.arrays`.
"""

from jopt.quantization.calibration import calibrate as calibrate
from jopt.quantization.conversion import quantize as quantize
from jopt.quantization.execute import execute as execute
from jopt.quantization.fake import fake_quantize as fake_quantize
from jopt.quantization.folding import fold_batch_norm as fold_batch_norm
from jopt.quantization.layer_report import QuantizationReport as QuantizationReport
from jopt.quantization.post_training import gptq as gptq
from jopt.quantization.post_training import rtn as rtn
from jopt.quantization.post_training import svdquant as svdquant
from jopt.quantization.rotation import RotationReport as RotationReport
from jopt.quantization.rotation import execute_rotated as execute_rotated
from jopt.quantization.rotation import rotate as rotate
from jopt.quantization.state import QuantizeState as QuantizeState
from jopt.quantization.state import get_scales as get_scales
from jopt.quantization.weights import quantize_weights as quantize_weights
