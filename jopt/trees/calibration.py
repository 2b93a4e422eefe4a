"""A calibration: what every site and leaf of a model is rounded by.

It is measured, trained and shipped as one value. Its leaves are ends of ranges in
float32, so that Optax can train them; the specs travel along as static fields, and
`jopt.save` writes it beside the params.
"""

import dataclasses
from typing import Any

import jax
import rich.box
import rich.table
import rich.text

from jopt.arrays.ranges import Range
from jopt.arrays.specs import QuantSpec
from jopt.trees import report

Pair = tuple[Any, Any]  # for both operands of a site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Calibration:
    """What every site and leaf is rounded by.

    Attributes:
        activations: name of a site to the ranges of both operands, None where one is
            left alone; with leading axes for the scans and devices around the site.
        weights: path of a leaf to its range, where that is trained.
        activation_specs: site and the specs of both operands.
        weight_specs: path and spec, with explicit axes.
        unreached: the sites that never ran while it was measured, or saw only zeros.
            They have no range, and stay float.
    """

    activations: dict[str, Pair]
    weights: dict[str, Range]
    activation_specs: tuple[tuple[str, Pair], ...] = dataclasses.field(
        metadata={"static": True}
    )
    weight_specs: tuple[tuple[str, QuantSpec], ...] = dataclasses.field(
        metadata={"static": True}
    )
    unreached: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    def __repr__(self) -> str:
        """Draw a table of the ranges, and list below it what was never reached."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        for column in ("site", "spec", "low", "high"):
            table.add_column(column, no_wrap=True)
        specs = dict(self.activation_specs)
        for name, pair in self.activations.items():
            for spec, ends in zip(specs[name], pair, strict=True):
                if ends is not None:
                    cells = (name, repr(spec), *_ends(ends))
                    table.add_row(*map(rich.text.Text, cells))
        lines = [report.draw(table)]
        if self.unreached:
            names = ", ".join(self.unreached)
            lines.append(f" never ran, or saw only zeros, and stay float: {names}")
        return "\n".join(lines)


def _ends(ends: Range) -> tuple[str, str]:
    low = ends.high if ends.low is None else ends.low
    return _span(low, -1), _span(ends.high, 1)


def _span(end: Any, sign: int) -> str:
    """Write one number, or the least and the largest of several; magnitudes count."""
    if not hasattr(end, "min") or isinstance(end, jax.core.Tracer):
        return "traced"
    end = sign * abs(end) + 0.0  # no negative zero
    least, most = float(end.min()), float(end.max())
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
