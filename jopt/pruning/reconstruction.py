"""How well pruned layers still do what the dense ones did, on real inputs.

    error = ||X W - X W'||^2 / ||X W||^2 = tr(D^T G D) / tr(W^T G W),
    D = W - W',   G = X^T X

is measured where SparseGPT and Wanda choose what to prune: with the inputs that the
layer met in the calibration batches.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import rich.box
import rich.table
import rich.text

from jopt.trees import report


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
        error: relative error of what it computes, squared; 0 is none, 1 is all.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    sparsity: float
    error: float


@dataclasses.dataclass(frozen=True)
class OneShotReport:
    """What one-shot pruning did to every layer, and what it left alone.

    Iterate over it for the rows, index it by the name of a row, print it for a table.

    Attributes:
        rows: of the pruned layers, in the order of the program.
        left_alone: path, or name of a layer, to why it was not pruned.
    """

    rows: tuple[LayerRow, ...]
    left_alone: Mapping[str, str]

    @property
    def worst(self) -> tuple[LayerRow, ...]:
        """The rows, the largest error first."""
        return tuple(sorted(self.rows, key=lambda row: -row.error))

    def to_dicts(self) -> list[dict[str, Any]]:
        """List the rows as dicts of JSON values.

        Returns:
            A dict per row.
        """
        return [dataclasses.asdict(row) for row in self.rows]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; there are {[row.name for row in self]}")

    def __str__(self) -> str:
        """Draw the table, and list what was left alone below it."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column("layer", no_wrap=True)
        for column in ("shape", "sparsity", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            sparsity = f"{100 * row.sparsity:.1f} %"
            cells = (row.name, str(list(row.shape)), sparsity, f"{row.error:.2e}")
            table.add_row(*map(rich.text.Text, cells))
        lines = [report.draw(table)]
        if self.left_alone:
            lines.append(" left alone:")
            lines += [f"   {path}: {why}" for path, why in self.left_alone.items()]
        return "\n".join(lines)

    __repr__ = __str__
