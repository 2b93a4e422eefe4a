"""Allocations: how many units each layer of each leaf keeps.

Reading order: `units` (what an allocation is, and the uniform one), `ranking` (layers
compete by their scores), `shares` (densities in given proportions), `outliers`
(densities by the share of outliers).
"""

from jopt.pruning.allocation.outliers import owl as owl
from jopt.pruning.allocation.ranking import global_ranking as global_ranking
from jopt.pruning.allocation.ranking import lamp as lamp
from jopt.pruning.allocation.shares import er as er
from jopt.pruning.allocation.shares import erk as erk
from jopt.pruning.allocation.shares import sensitivity as sensitivity
from jopt.pruning.allocation.units import Allocation as Allocation
from jopt.pruning.allocation.units import Units as Units
from jopt.pruning.allocation.units import uniform as uniform
