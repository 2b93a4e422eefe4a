"""How well quantized layers still do what the floats did, on real inputs.

error           = ||X W - X Q||^2 / ||X W||^2
signal to noise = 10 log10(||W||^2 / ||W - Q||^2)    in dB
"""

import dataclasses
import math
from collections.abc import Mapping

from jopt.trees.layer_report import LayerReport, scientific


@dataclasses.dataclass(frozen=True)
class QuantizedRow:
    """One quantized layer.

    Attributes:
        name: of the site, and `[layer]` where its leaf stacks layers.
        path: of the leaf.
        layer: which of the leaf's layers, None where there is one.
        shape: `(columns, outputs)` of its matrix, with the number of them in front
            where there are several, as of experts or groups.
        format: its name.
        bits: per weight, scales included.
        signal_to_noise: of the weights, in dB; infinite where nothing was lost.
        error: relative error of what it computes, squared; 0 is none, 1 is all. None
            where it was not measured, or nothing reached the layer.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    format: str
    bits: float
    signal_to_noise: float
    error: float | None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {
            "shape": str(list(self.shape)),
            "format": self.format,
            "bits": f"{self.bits:.2f}",
            "SNR dB": f"{self.signal_to_noise:.1f}",
            "error": scientific(self.error),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizationReport(LayerReport[QuantizedRow]):
    """What quantization did to every layer, and what it left alone.

    Iterate over it for the rows in the order of the program, index it by the name of a
    row, print it for a table with the largest error first.
    """

    def shown(self) -> tuple[QuantizedRow, ...]:
        """The rows, the worst first: by error, else by the noise of the weights."""

        def badness(row: QuantizedRow) -> float:
            return -row.signal_to_noise if row.error is None else row.error

        return tuple(sorted(self.rows, key=badness, reverse=True))


def decibels(noise: float, signal: float) -> float:
    """Return 10 log10(signal / noise).

    >>> decibels(1.0, 100.0)
    20.0
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
