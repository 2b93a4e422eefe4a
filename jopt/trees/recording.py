"""A recording: what was kept of the sites of a model over some batches.

A tree of arrays, which `jopt.save` writes and `jopt.restore` brings back as it was, so
that recording can go on where it ended.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recording:
    """The statistics so far.

    Attributes:
        count: the number of batches.
        values: name of a site to its statistic, with a leading axis per scan over
            layers around it, and one for the devices of a `shard_map` around it.
    """

    count: jax.Array
    values: dict[str, Any]
