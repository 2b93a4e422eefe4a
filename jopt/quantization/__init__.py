"""Quantization: fewer bits per number.

Reading order: `roles` and `specs` (which leaf gets which spec), `state` (what training
on the grid remembers), `grids`, `oscillations` and `projections` (how latents land on
the grid), `freezing` (which of them stay), `learned` (gradients of a clipped grid and
of its scale), `snapping` and `weights` (training on the grid), `dorefa`, `conversion`
(float trees to quantized trees), `operands` (what is rounded at a site), `observers`
and `calibration` (static ranges), `learned_ranges`, `arguments`, `backward` and `fake`
(quantization-aware functions), `products`, `microscaled`, `low_rank` and `execute`
(codes times codes, and beside them thin matrices), `folding` (norms into weights),
`factors` and `input_factors` (numbers per channel), `equalization` and `smoothing`
(factors moved between leaves), `rotation_plan` and `rotation` (outliers spread over all
channels), `bias_correction`; `layer_scales`, `layer_solving`, `layer_report`, `layers`
and `post_training` (quantization with calibration data), each method's matrix in a file
of its name, such as `gptq`; `svdquant`; `learned_rounding` and `rounding_methods`
(rounding that is learned or fitted), `sampling` (data that models make up); `cache`
(keys and values of attention, stored by `cache_storage`), `clusters` and
`cluster_weights` (shared values). One array's formats and steps are in `jopt.arrays`.
"""

from jopt.quantization.bias_correction import BiasReport as BiasReport
from jopt.quantization.bias_correction import correct_bias as correct_bias
from jopt.quantization.cache import CacheView as CacheView
from jopt.quantization.cache import KeyValueCache as KeyValueCache
from jopt.quantization.cache import init_cache as init_cache
from jopt.quantization.calibration import calibrate as calibrate
from jopt.quantization.cluster_weights import cluster_weights as cluster_weights
from jopt.quantization.cluster_weights import get_centroids as get_centroids
from jopt.quantization.clusters import cluster as cluster
from jopt.quantization.clusters import get_codebooks as get_codebooks
from jopt.quantization.clusters import set_codebooks as set_codebooks
from jopt.quantization.conversion import quantize as quantize
from jopt.quantization.dorefa import dorefa as dorefa
from jopt.quantization.equalization import EqualizationReport as EqualizationReport
from jopt.quantization.equalization import equalize as equalize
from jopt.quantization.execute import execute as execute
from jopt.quantization.fake import fake_quantize as fake_quantize
from jopt.quantization.folding import fold_batch_norm as fold_batch_norm
from jopt.quantization.freezing import freeze as freeze
from jopt.quantization.layer_report import QuantizationReport as QuantizationReport
from jopt.quantization.post_training import awq as awq
from jopt.quantization.post_training import gptq as gptq
from jopt.quantization.post_training import rtn as rtn
from jopt.quantization.rotation import RotationReport as RotationReport
from jopt.quantization.rotation import execute_rotated as execute_rotated
from jopt.quantization.rotation import rotate as rotate
from jopt.quantization.rounding_methods import adaround as adaround
from jopt.quantization.rounding_methods import autoround as autoround
from jopt.quantization.rounding_methods import hqq as hqq
from jopt.quantization.sampling import sample_tokens as sample_tokens
from jopt.quantization.smoothing import Smoothed as Smoothed
from jopt.quantization.smoothing import SmoothingReport as SmoothingReport
from jopt.quantization.smoothing import smooth as smooth
from jopt.quantization.state import QuantizeState as QuantizeState
from jopt.quantization.state import get_scales as get_scales
from jopt.quantization.svdquant import svdquant as svdquant
from jopt.quantization.weights import quantize_weights as quantize_weights
