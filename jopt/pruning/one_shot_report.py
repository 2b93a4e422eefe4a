"""How well pruned layers still do what the dense ones did, on real inputs.

    error = ||X W - X W'||^2 / ||X W||^2 = tr(D^T G D) / tr(W^T G W),
    D = W - W',   G = X^T X

is measured where SparseGPT and Wanda choose what to prune: with the inputs that the
layer met in the calibration batches.
"""

import dataclasses
from collections.abc import Mapping

from jopt.trees.layer_report import LayerReport, scientific


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One pruned layer.

    Attributes:
        name: of the site, and `[layer]` where its leaf stacks layers.
        path: of the leaf.
        layer: which of the leaf's layers, None where there is one.
        shape: `(columns, outputs)` of its matrix, with the number of them in front
            where there are several, as of experts or groups.
        sparsity: fraction of zeros in its mask.
        error: relative error of what it computes, squared; 0 is none, 1 is all. None
            where it was not measured.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    sparsity: float
    error: float | None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {
            "shape": str(list(self.shape)),
            "sparsity": f"{100 * self.sparsity:.1f} %",
            "error": scientific(self.error),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class OneShotReport(LayerReport[LayerRow]):
    """What one-shot pruning did to every layer, and what it left alone.

    Iterate over it for the rows, index it by the name of a row, print it for a table.
    """
