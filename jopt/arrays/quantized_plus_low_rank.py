"""An array of few bits, and beside it a few columns and rows in high precision.

    W ~ dequantize(residual) + lora_a lora_b,    lora_a [in, rank], lora_b [rank, out]

What is hardest to write in few bits, the largest directions of W, goes into the
factors, and what is left has a small range: Li et al., SVDQuant, arXiv:2411.05007.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jopt.arrays import quantized_shards
from jopt.arrays.axes import varying_axes
from jopt.arrays.codes import round_to_dtype
from jopt.arrays.compressed import CompressedArray
from jopt.arrays.quantized import QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedPlusLowRank(CompressedArray):
    """A quantized array plus the product of two thin ones.

    W ~ dequantize(residual) + lora_a lora_b

    Invariants:
        * The factors have the rank of the array. `lora_a` has the array's inputs, and
          in place of its last output axis the rank; other output axes are of size one.
          `lora_b` has the outputs, and in place of the first input axis the rank; other
          input axes are of size one. Both have all other axes (layers, experts) whole.
          So a matrix [in, out] has factors [in, rank] and [rank, out].
        * Shape and dtype are those of the residual, so that `lax.scan` may slice a
          leading axis off all children, and `vmap` may add one.

    Attributes:
        residual: what is stored in few bits.
        lora_a: float factor.
        lora_b: float factor.
        inputs: the axes that `lora_a` has, counted from the end, in order.
        outputs: the axes that `lora_b` has, counted from the end, in order.
    """

    residual: QuantizedArray
    lora_a: jax.Array
    lora_b: jax.Array
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        return self.residual.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """The dtype of the array that it stands for."""
        return self.residual.dtype

    @property
    def rank(self) -> int:
        """The number of columns of the first factor."""
        return int(self.lora_a.shape[self.outputs[-1]])

    def factors(self) -> tuple[tuple[jax.Array, str], tuple[jax.Array, str]]:
        """Return both factors without axes of size one, and their axes as letters.

        Returns:
            `(lora_a, letters)` and `(lora_b, letters)`: axis i of the array is letter i
            of the alphabet, the rank is "R".
        """
        found = []
        for part, without, others in (
            (self.lora_a, self.outputs[-1], self.outputs[:-1]),
            (self.lora_b, self.inputs[0], self.inputs[1:]),
        ):
            names = list(string.ascii_lowercase[: self.ndim])
            names[without] = "R"
            gone = [axis + self.ndim for axis in others]
            letters = "".join(n for i, n in enumerate(names) if i not in gone)
            found.append((jnp.squeeze(part, gone), letters))
        return found[0], found[1]

    def to_array(self) -> jax.Array:
        """Compute the floats that it stands for, in float32, rounded once."""
        (a, a_axes), (b, b_axes) = self.factors()
        low_rank = jnp.einsum(
            f"{a_axes},{b_axes}->{string.ascii_lowercase[: self.ndim]}",
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        wide = dataclasses.replace(self.residual, dtype=jnp.dtype(jnp.float32))
        return round_to_dtype(wide.to_array() + low_rank, self.dtype)

    def after(
        self, primitive: str, params: Mapping[str, Any], operands: Sequence[Any]
    ) -> "QuantizedPlusLowRank | tuple[QuantizedPlusLowRank, ...] | None":
        """Take a view: of the residual as it does it, of the factors likewise.

        Casts, transposes, slices of single layers and gathers over devices; everything
        else is computed.
        """
        if primitive == "unstack":
            return _unstack(self, params, operands)
        rule = _RULES.get(primitive)
        factors = None if rule is None else rule(self, params, operands)
        residual = self.residual.after(primitive, params, operands)
        if factors is None or not isinstance(residual, QuantizedArray):
            return None
        return QuantizedPlusLowRank(residual, *factors)

    def partition_specs(
        self, spec: PartitionSpec, sizes: Mapping[str, int]
    ) -> "QuantizedPlusLowRank | None":
        """Split factors along the axes that they have whole, as the array is split."""
        residual = self.residual.partition_specs(spec, sizes)
        if residual is None:
            return None
        entries = [*spec, *[None] * (self.ndim - len(spec))]

        def without(axes: Sequence[int]) -> Any:
            gone = {axis + self.ndim for axis in axes}
            kept = (None if i in gone else entry for i, entry in enumerate(entries))
            return PartitionSpec(*kept)  # type: ignore[no-untyped-call]

        return dataclasses.replace(
            self,
            residual=residual,
            lora_a=without(self.outputs),
            lora_b=without(self.inputs),
        )

    def __repr__(self) -> str:
        if not hasattr(self.lora_a, "shape"):
            return f"QuantizedPlusLowRank({self.residual!r})"
        return (
            f"QuantizedPlusLowRank({self.dtype}{list(self.shape)}, "
            f"{self.residual.spec!r}, rank={self.rank}, "
            f"{self.bits_per_weight:.4g} bits per weight)"
        )


def multiply_factors(lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """Multiply the factors of one matrix, as it is done when an array is decoded.

    Args:
        lora_a: [inputs, rank].
        lora_b: [rank, outputs].

    Returns:
        float32 [inputs, outputs].

    >>> multiply_factors(jnp.ones((2, 1)), jnp.array([[3.0, 4.0]]))
    Array([[3., 4.],
           [3., 4.]], dtype=float32)
    """
    wide = (factor.astype(jnp.float32) for factor in (lora_a, lora_b))
    return jnp.matmul(*wide, precision=lax.Precision.HIGHEST)


_Factors = tuple[jax.Array, jax.Array, tuple[int, ...], tuple[int, ...]]


def _same(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors:
    return w.lora_a, w.lora_b, w.inputs, w.outputs


def _transpose(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors | None:
    order = tuple(params["permutation"])
    inputs, outputs = (
        tuple(order.index(axis + w.ndim) - w.ndim for axis in axes)
        for axes in (w.inputs, w.outputs)
    )
    # The axis that the rank stands for must stay the first, or the last.
    if min(inputs) != inputs[0] or max(outputs) != outputs[-1]:
        return None
    a, b = (jnp.transpose(part, order) for part in (w.lora_a, w.lora_b))
    return a, b, tuple(sorted(inputs)), tuple(sorted(outputs))


def _slice(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors | None:
    starts, stops = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * w.ndim
    runs = list(zip(starts, stops, steps, strict=True))
    touched = [a for a, run in enumerate(runs) if run != (0, w.shape[a], 1)]
    if not _are_layers(w, touched):
        return None
    index = tuple(
        slice(*run) if axis in touched else slice(None) for axis, run in enumerate(runs)
    )
    return w.lora_a[index], w.lora_b[index], w.inputs, w.outputs


def _dynamic_slice(
    w: QuantizedPlusLowRank, params: Any, operands: Sequence[Any]
) -> _Factors | None:
    sizes = params["slice_sizes"]
    touched = [a for a in range(w.ndim) if sizes[a] != w.shape[a]]
    if not _are_layers(w, touched):
        return None
    zero = jnp.zeros((), jnp.int32)
    starts = [
        jnp.asarray(operands[a], jnp.int32) if a in touched else zero
        for a in range(w.ndim)
    ]
    a, b = (
        lax.dynamic_slice(
            part,
            starts,
            [sizes[i] if i in touched else n for i, n in enumerate(part.shape)],
        )
        for part in (w.lora_a, w.lora_b)
    )
    return a, b, w.inputs, w.outputs


def _squeeze(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors | None:
    gone = sorted(axis % w.ndim for axis in params["dimensions"])
    if not _are_layers(w, gone):
        return None
    left = [axis for axis in range(w.ndim) if axis not in gone]
    inputs, outputs = (
        tuple(left.index(axis + w.ndim) - len(left) for axis in axes)
        for axes in (w.inputs, w.outputs)
    )
    a, b = (jnp.squeeze(part, gone) for part in (w.lora_a, w.lora_b))
    return a, b, inputs, outputs


def _all_gather(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors | None:
    """Gather the factor that is split; the other must be one on all devices."""
    axis, names = params["all_gather_dimension"], params["axis_name"]
    devices = {names} if isinstance(names, str) else set(names)
    is_tracked = devices <= set(varying_axes(w.residual.codes))
    if not params["tiled"] or params["axis_index_groups"]:
        return None
    found = []
    for part, without in ((w.lora_a, w.outputs), (w.lora_b, w.inputs)):
        if axis - w.ndim not in without:
            part = lax.all_gather(part, names, axis=axis, tiled=True)
        elif not is_tracked or devices & set(varying_axes(part)):
            return None
        found.append(part)
    return found[0], found[1], w.inputs, w.outputs


def _vary(w: QuantizedPlusLowRank, params: Any, operands: Any) -> _Factors:
    a, b = quantized_shards.vary((w.lora_a, w.lora_b), params, operands)
    return a, b, w.inputs, w.outputs


def _unstack(
    w: QuantizedPlusLowRank, params: Any, operands: Any
) -> tuple[QuantizedPlusLowRank, ...] | None:
    """Take all layers apart."""
    axis = params["axis"]
    residuals = w.residual.after("unstack", params, operands)
    if not isinstance(residuals, tuple) or not _are_layers(w, [axis]):
        return None
    inputs, outputs = (
        tuple(a if axis - w.ndim < a else a + 1 for a in axes)
        for axes in (w.inputs, w.outputs)
    )
    factors = [jnp.moveaxis(part, axis, 0) for part in (w.lora_a, w.lora_b)]
    return tuple(
        QuantizedPlusLowRank(residual, a, b, inputs, outputs)
        for residual, a, b in zip(residuals, *factors, strict=True)
        if isinstance(residual, QuantizedArray)
    )


def _are_layers(w: QuantizedPlusLowRank, axes: Sequence[int]) -> bool:
    """Tell whether both factors have some axes whole."""
    return not {axis - w.ndim for axis in axes} & {*w.inputs, *w.outputs}


_RULES: Mapping[str, Any] = {
    "all_gather": _all_gather,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "dynamic_slice": _dynamic_slice,
    "name": _same,
    "pvary": _vary,
    "slice": _slice,
    "squeeze": _squeeze,
    "stop_gradient": _same,
    "transpose": _transpose,
}
