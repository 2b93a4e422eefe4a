"""Make JAX models smaller and faster without touching the model's code.

What happens to parameters is an Optax gradient transformation around yours:

    tx = jopt.quantize_weights(
        jopt.prune(optax.adamw(1e-3), sparsity=0.9), jopt.QuantSpec(jopt.formats.int8)
    )

and the training loop stays `grad -> tx.update -> optax.apply_updates`. The map:

    one array     make_mask, Unstructured, NM, Block, Channel, pack_mask, unpack_mask,
                  formats, QuantSpec, QuantizedArray, QuantizedPlusLowRank,
                  ClusteredArray, CompressedArray
    many leaves   matching, report, save, restore, steps, read_metadata;
                  read_gguf, read_compressed_tensors, write_compressed_tensors
    an update     project, prune, ste, sr_ste, top_kast, ac_dc, rewind, proximal with
                  proximal_maps, quantize_weights with projections and rounding, dorefa,
                  freeze, cluster_weights, get_masks, apply_masks, update_masks,
                  get_scales, get_centroids; scores and allocation to choose from
    a value       schedules
    a tree        quantize with scale_fits, hqq, dequantize;
                  cluster, get_codebooks, set_codebooks
    a function    sites, rewrite with a Handler, record a Statistic, functional;
                  fake_quantize, calibrate with observers, execute;
                  sparsegpt and wanda; gptq, awq, svdquant, adaround, autoround
                  and rtn;
                  equalize, smooth, rotate and correct_bias
    generation    init_cache, KeyValueCache, sample_tokens
    a loss        distillation
"""

from jopt import distillation as distillation
from jopt import schedules as schedules
from jopt.arrays import formats as formats
from jopt.arrays import rounding as rounding
from jopt.arrays import scale_fits as scale_fits
from jopt.arrays.clustered import ClusteredArray as ClusteredArray
from jopt.arrays.compressed import CompressedArray as CompressedArray
from jopt.arrays.packing import pack_mask as pack_mask
from jopt.arrays.packing import unpack_mask as unpack_mask
from jopt.arrays.patterns import NM as NM
from jopt.arrays.patterns import Block as Block
from jopt.arrays.patterns import Channel as Channel
from jopt.arrays.patterns import Unstructured as Unstructured
from jopt.arrays.patterns import make_mask as make_mask
from jopt.arrays.quantized import QuantizedArray as QuantizedArray
from jopt.arrays.quantized import dequantize as dequantize
from jopt.arrays.quantized_plus_low_rank import (
    QuantizedPlusLowRank as QuantizedPlusLowRank,
)
from jopt.arrays.specs import QuantSpec as QuantSpec
from jopt.programs import statistics as statistics
from jopt.programs.counts import count_bytes as count_bytes
from jopt.programs.counts import count_flops as count_flops
from jopt.programs.counts import sites as sites
from jopt.programs.handlers import Handler as Handler
from jopt.programs.handlers import Use as Use
from jopt.programs.interpret import rewrite as rewrite
from jopt.programs.modules import functional as functional
from jopt.programs.record import Recording as Recording
from jopt.programs.record import Statistic as Statistic
from jopt.programs.record import record as record
from jopt.programs.sites import SiteTable as SiteTable
from jopt.pruning import OneShotReport as OneShotReport
from jopt.pruning import ac_dc as ac_dc
from jopt.pruning import allocation as allocation
from jopt.pruning import apply_masks as apply_masks
from jopt.pruning import get_masks as get_masks
from jopt.pruning import iterative_masks as iterative_masks
from jopt.pruning import make_masks as make_masks
from jopt.pruning import proximal as proximal
from jopt.pruning import proximal_maps as proximal_maps
from jopt.pruning import prune as prune
from jopt.pruning import rewind as rewind
from jopt.pruning import rigl as rigl
from jopt.pruning import scores as scores
from jopt.pruning import set_ as set_
from jopt.pruning import snfs as snfs
from jopt.pruning import sparsegpt as sparsegpt
from jopt.pruning import sparsify_activations as sparsify_activations
from jopt.pruning import sr_ste as sr_ste
from jopt.pruning import static_sparse as static_sparse
from jopt.pruning import ste as ste
from jopt.pruning import top_kast as top_kast
from jopt.pruning import update_masks as update_masks
from jopt.pruning import wanda as wanda
from jopt.quantization import KeyValueCache as KeyValueCache
from jopt.quantization import QuantizationReport as QuantizationReport
from jopt.quantization import RotationReport as RotationReport
from jopt.quantization import adaround as adaround
from jopt.quantization import autoround as autoround
from jopt.quantization import awq as awq
from jopt.quantization import calibrate as calibrate
from jopt.quantization import cluster as cluster
from jopt.quantization import cluster_weights as cluster_weights
from jopt.quantization import correct_bias as correct_bias
from jopt.quantization import dorefa as dorefa
from jopt.quantization import equalize as equalize
from jopt.quantization import execute as execute
from jopt.quantization import execute_rotated as execute_rotated
from jopt.quantization import fake_quantize as fake_quantize
from jopt.quantization import fold_batch_norm as fold_batch_norm
from jopt.quantization import freeze as freeze
from jopt.quantization import get_centroids as get_centroids
from jopt.quantization import get_codebooks as get_codebooks
from jopt.quantization import get_scales as get_scales
from jopt.quantization import gptq as gptq
from jopt.quantization import hqq as hqq
from jopt.quantization import init_cache as init_cache
from jopt.quantization import observers as observers
from jopt.quantization import projections as projections
from jopt.quantization import quantize as quantize
from jopt.quantization import quantize_weights as quantize_weights
from jopt.quantization import rotate as rotate
from jopt.quantization import rtn as rtn
from jopt.quantization import sample_tokens as sample_tokens
from jopt.quantization import set_codebooks as set_codebooks
from jopt.quantization import smooth as smooth
from jopt.quantization import svdquant as svdquant
from jopt.trees.calibration import Calibration as Calibration
from jopt.trees.checkpoint import read_metadata as read_metadata
from jopt.trees.checkpoint import restore as restore
from jopt.trees.checkpoint import save as save
from jopt.trees.checkpoint import steps as steps
from jopt.trees.compressed_tensors import (
    read_compressed_tensors as read_compressed_tensors,
)
from jopt.trees.compressed_tensors import (
    write_compressed_tensors as write_compressed_tensors,
)
from jopt.trees.gguf_file import read_gguf as read_gguf
from jopt.trees.manifest import CheckpointError as CheckpointError
from jopt.trees.report import report as report
from jopt.trees.rules import matching as matching
from jopt.updates.project import Projection as Projection
from jopt.updates.project import project as project

__version__ = "0.1.0"
