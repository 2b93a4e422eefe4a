"""The table of a tree: what each leaf is called, how sparse it is, what it weighs.

    sparsity = zeros / size          bits = 8 * bytes / size, per weight

Zeros are exact zeros: subnormal numbers count as weights. The bytes of a quantized leaf
are those of its packed codes and scales together.
"""

import dataclasses
import functools
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from jopt.arrays import packing, quantized
from jopt.arrays.clustered import ClusteredArray
from jopt.arrays.quantized_plus_low_rank import QuantizedPlusLowRank
from jopt.trees import paths


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a report: a leaf, or all of them."""

    path: str
    shape: tuple[int, ...] | None  # None for the total
    dtype: str
    size: int
    sparsity: float | None  # fraction of exact zeros; None where no values are known
    masked: float | None  # fraction that the mask holds at zero; None without a mask
    bits: float  # stored bits per weight
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a tree and their total; `str` gives an aligned table."""

    rows: tuple[Row, ...]
    total: Row

    def __str__(self) -> str:
        """Draw the table."""
        columns = [column for column in _COLUMNS if self._has(column)]
        table = rich.table.Table(box=rich.box.SIMPLE, show_footer=True)
        for column in columns:
            right = column in ("sparsity", "masked", "bits", "bytes")
            total = _text(self.total, column)
            table.add_column(
                column, total, justify="right" if right else "left", no_wrap=True
            )
        for row in self.rows:
            # As Text, because a plain string may hold what rich takes for markup.
            table.add_row(*(rich.text.Text(_text(row, name)) for name in columns))
        return draw(table)

    def to_dicts(self) -> list[dict[str, Any]]:
        """List rows and total as dicts of JSON values.

        Returns:
            A dict per row, the total last.
        """
        return [dataclasses.asdict(row) for row in (*self.rows, self.total)]

    def _has(self, column: str) -> bool:
        return column != "masked" or self.total.masked is not None


_COLUMNS = ("path", "shape", "dtype", "sparsity", "masked", "bits", "bytes")


def draw(table: rich.table.Table) -> str:
    """Draw a table as plain text, as wide as it needs to be.

    Args:
        table: of rich.

    Returns:
        Its lines, none of them empty.
    """
    console = rich.console.Console(
        file=io.StringIO(), width=10_000, color_system=None, highlight=False
    )
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(line for line in lines if line)


def report(tree: Any, *, masks: Any = None) -> Report:
    """Describe every array of a tree, and the tree as a whole.

    sparsity = zeros / size,   bits = 8 bytes / size

    Args:
        tree: any pytree of arrays, quantized arrays and `jax.ShapeDtypeStruct`s, whose
            sparsity reads '-'. Leaves that are no arrays are left out.
        masks: a tree like `tree` of bool or packed masks, True = keep, with
            `optax.MaskedNode()` where there is none; adds a column with the fraction
            that is masked, whose total is over the leaves that have a mask.

    Returns:
        Rows in the order of the leaves, and their total.

    Raises:
        ValueError: a leaf is traced, or `masks` does not fit.

    >>> params = {"dense": {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}}
    >>> print(report(params))
      path           shape    dtype     sparsity   bits   bytes
     ───────────────────────────────────────────────────────────
      dense/kernel   [2, 2]   float32     75.0 %   32.0      16
     ───────────────────────────────────────────────────────────
      total          4                    75.0 %   32.0      16
    """
    leaves, treedef = paths.flatten_with_path(tree)
    chosen = [None] * len(leaves) if masks is None else _masks(masks, treedef)
    for (path, leaf), mask in zip(leaves, chosen, strict=True):
        if mask is not None and not packing.is_mask_of(mask, np.shape(leaf)):
            raise ValueError(
                f"masks must fit {path!r} of shape {np.shape(leaf)}, got "
                f"{mask.dtype}{list(mask.shape)}; pass jopt.get_masks(state)"
            )
    rows = tuple(
        _row(path, leaf, mask)
        for (path, leaf), mask in zip(leaves, chosen, strict=True)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )
    return Report(rows, _total(rows))


def _masks(masks: Any, treedef: Any) -> list[Any]:
    try:
        found = treedef.flatten_up_to(masks)
    except ValueError as error:
        raise ValueError(
            "masks must be a tree like the one reported, with optax.MaskedNode() "
            f"where there is none: {error}"
        ) from error
    return [mask if hasattr(mask, "dtype") else None for mask in found]


def _row(path: str, leaf: Any, mask: Any) -> Row:
    if any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(leaf)):
        raise ValueError(
            f"report needs concrete arrays, got a tracer at {path!r}; "
            "call it outside jit, or on jax.eval_shape's result"
        )
    nbytes = _nbytes(leaf)
    return Row(
        path=path,
        shape=tuple(leaf.shape),
        dtype=_dtype_name(leaf),
        size=_size(leaf),
        sparsity=_zero_fraction(leaf),
        masked=None if mask is None else _zero_fraction(packing.unpack_mask(mask)),
        bits=8 * nbytes / max(_size(leaf), 1),
        nbytes=nbytes,
    )


def _total(rows: tuple[Row, ...]) -> Row:
    size, nbytes = sum(row.size for row in rows), sum(row.nbytes for row in rows)
    return Row(
        path="total",
        shape=None,
        dtype="",
        size=size,
        sparsity=_mean([(row.sparsity, row.size) for row in rows]),
        masked=_mean([(row.masked, row.size) for row in rows]),
        bits=8 * nbytes / max(size, 1),
        nbytes=nbytes,
    )


def _mean(parts: list[tuple[float | None, int]]) -> float | None:
    """Average fractions by size, over the leaves that have one."""
    known = [(fraction, size) for fraction, size in parts if fraction is not None]
    if not known:
        return None
    return sum(f * size for f, size in known) / max(sum(size for _, size in known), 1)


def _dtype_name(leaf: Any) -> str:
    match leaf:
        case quantized.QuantizedArray():
            return leaf.spec.format.name
        case QuantizedPlusLowRank():
            return f"{leaf.residual.spec.format.name} + rank {leaf.rank}"
        case ClusteredArray():
            return f"{leaf.num_clusters} clusters of {leaf.vector_size}"
    return str(leaf.dtype)


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def _nbytes(leaf: Any) -> int:
    """Count bytes as JAX does: a value of fewer than 8 bits takes a byte of its own."""
    if hasattr(leaf, "nbytes"):
        return int(leaf.nbytes)
    return _size(leaf) * int(leaf.dtype.itemsize)


def _zero_fraction(leaf: Any) -> float | None:
    """Compute the fraction of zeros; None where there are no values, or no numbers."""
    is_number = not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    is_abstract = isinstance(jax.tree.leaves(leaf)[0], jax.ShapeDtypeStruct)
    if is_abstract or not is_number:
        return None
    leaf = quantized.dequantize(leaf)
    if isinstance(leaf, np.ndarray):
        nonzero = int(np.count_nonzero(leaf))
    else:
        low, high = _count_nonzero(leaf)
        nonzero = int(low) + (int(high) << 16)
    return 1 - nonzero / _size(leaf) if _size(leaf) else 0.0


@functools.partial(jax.jit, inline=True)
def _count_nonzero(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Count in two halves, so that uint32 is wide enough for 2^32 elements and more."""
    rows = jnp.sum(
        _is_nonzero(array), axis=-1 if array.ndim else None, dtype=jnp.uint32
    )
    low = jnp.sum(rows & 0xFFFF, dtype=jnp.uint32)
    return low, jnp.sum(rows >> 16, dtype=jnp.uint32)


def _is_nonzero(array: jax.Array) -> jax.Array:
    """Compare bits, because float comparisons take subnormal numbers for zero."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array != 0
    if array.dtype.itemsize == 1:
        return array.astype(jnp.float32) != 0
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, unsigned) << 1 != 0


def _text(row: Row, column: str) -> str:
    match column:
        case "path":
            return row.path
        case "shape":
            return f"{row.size:,}" if row.shape is None else str(list(row.shape))
        case "dtype":
            return row.dtype
        case "bits":
            return f"{row.bits:.1f}" if row.bits >= 1 else f"{row.bits:.3g}"
        case "bytes":
            return f"{row.nbytes:,}"
    fraction = row.sparsity if column == "sparsity" else row.masked
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
