"""Quantization: fewer bits per number.

Reading order: `roles` and `specs` (which leaf gets which spec), `state` (what training
on the grid remembers), `learned` (gradients of a clipped grid and of its scale),
`weights` (training on the grid), `conversion` (float trees to quantized trees),
`operands` (what is rounded at a site), `observers` and `calibration` (static ranges),
`learned_ranges`, `arguments` and `fake` (quantization-aware functions), `products`,
`microscaled` and `execute` (codes times codes), `folding` (norms into weights), `cache`
(keys and values of attention, stored by `cache_storage`), `clusters` and
`cluster_weights` (shared values). One array's formats and steps are in `jopt.arrays`.
"""

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
from jopt.quantization.execute import execute as execute
from jopt.quantization.fake import fake_quantize as fake_quantize
from jopt.quantization.folding import fold_batch_norm as fold_batch_norm
from jopt.quantization.state import QuantizeState as QuantizeState
from jopt.quantization.state import get_scales as get_scales
from jopt.quantization.weights import quantize_weights as quantize_weights
