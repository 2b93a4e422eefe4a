"""Scores: how much each weight is worth keeping, higher = keep.

Reading order: `score` (what a criterion is), `weights` (of the params alone),
`channels` (whole channels), `gradients` (with gradients and moments),
`at_initialization` (of a loss or a function).
"""

from jopt.pruning.scores.at_initialization import grasp as grasp
from jopt.pruning.scores.at_initialization import snip as snip
from jopt.pruning.scores.at_initialization import synflow as synflow
from jopt.pruning.scores.channels import batch_norm_scale as batch_norm_scale
from jopt.pruning.scores.channels import fpgm as fpgm
from jopt.pruning.scores.gradients import fisher as fisher
from jopt.pruning.scores.gradients import movement as movement
from jopt.pruning.scores.gradients import obd as obd
from jopt.pruning.scores.gradients import saliency as saliency
from jopt.pruning.scores.gradients import taylor as taylor
from jopt.pruning.scores.score import Score as Score
from jopt.pruning.scores.score import ScoreFunction as ScoreFunction
from jopt.pruning.scores.score import ScoreInputs as ScoreInputs
from jopt.pruning.scores.score import as_score as as_score
from jopt.pruning.scores.weights import lamp as lamp
from jopt.pruning.scores.weights import magnitude as magnitude
from jopt.pruning.scores.weights import normalized as normalized
from jopt.pruning.scores.weights import random as random
