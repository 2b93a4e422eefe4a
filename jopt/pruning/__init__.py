"""Pruning: which weights are zero, and keeping them so.

Reading order: `scores` (how much each weight is worth), `allocation` (how many each
leaf keeps), `masks` (scores to masks for many leaves), `state` (what the wrapper
remembers, and how to read it), `prune` (the optimizer wrapper). Then its kin: `dynamic`
(masks that move), `straight_through` and `top_kast` (dense latents), `phases`,
`rewind`, and `proximal` (a penalty makes the zeros); and `one_shot` (pruning with
calibration data, no training).
"""

from jopt.pruning import allocation as allocation
from jopt.pruning import proximal_maps as proximal_maps
from jopt.pruning import scores as scores
from jopt.pruning.activations import sparsify_activations as sparsify_activations
from jopt.pruning.dynamic import rigl as rigl
from jopt.pruning.dynamic import set_ as set_
from jopt.pruning.dynamic import snfs as snfs
from jopt.pruning.dynamic import static_sparse as static_sparse
from jopt.pruning.one_shot import sparsegpt as sparsegpt
from jopt.pruning.one_shot import wanda as wanda
from jopt.pruning.one_shot_report import OneShotReport as OneShotReport
from jopt.pruning.phases import ac_dc as ac_dc
from jopt.pruning.proximal import proximal as proximal
from jopt.pruning.prune import prune as prune
from jopt.pruning.rewind import rewind as rewind
from jopt.pruning.state import PruneState as PruneState
from jopt.pruning.state import apply_masks as apply_masks
from jopt.pruning.state import get_masks as get_masks
from jopt.pruning.state import update_masks as update_masks
from jopt.pruning.straight_through import sr_ste as sr_ste
from jopt.pruning.straight_through import ste as ste
from jopt.pruning.top_kast import top_kast as top_kast
from jopt.pruning.tree_masks import iterative_masks as iterative_masks
from jopt.pruning.tree_masks import make_masks as make_masks
