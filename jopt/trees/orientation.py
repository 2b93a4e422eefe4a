"""Which way round a matrix is: [in, out] as JAX models have it, or [out, in] as others.

A quantized array turns without a byte of its codes being moved: the order "nk" is the
other orientation.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jopt.arrays.quantized import QuantizedArray
from jopt.trees import rules
from jopt.trees.rules import Predicate

# Names of matrices that are [in, out] and [out, in] in all frameworks that have them.
KERNELS = ("kernel", "w")
TABLES = ("weight", "embedding", "embeddings")


def turn_selected(
    leaves: Mapping[str, Any], transposed: Predicate | None
) -> dict[str, Any]:
    """Transpose the matrices that a predicate chooses.

    Args:
        leaves: name to leaf.
        transposed: `(name, leaf) -> bool`, or None for none.

    Returns:
        Name to leaf.

    Raises:
        ValueError: it chooses what is no matrix, or a pattern matches nothing.

    >>> turn_selected({"w": np.ones((2, 3))}, lambda name, leaf: True)["w"].shape
    (3, 2)
    """
    check_patterns(transposed, leaves)
    if transposed is None:
        return dict(leaves)
    return {
        name: _turned(name, leaf) if transposed(name, leaf) else leaf
        for name, leaf in leaves.items()
    }


def check_patterns(transposed: Predicate | None, names: Mapping[str, Any]) -> None:
    """Raise for a pattern that matches none of the names."""
    if isinstance(transposed, rules.Matching):
        rules.check_patterns(transposed.patterns, list(names))


def is_input_first(path: str, leaf: Any, transposed: Predicate | None) -> bool:
    """Tell whether a leaf is [in, out]: by its scales, its name or the caller's word.

    Args:
        path: of the leaf.
        leaf: an array.
        transposed: `(path, leaf) -> bool`, or None.

    Returns:
        False for all but matrices.

    Raises:
        ValueError: nothing says it, or two that do disagree.

    >>> is_input_first("dense/kernel", np.ones((2, 3)), None)
    True
    """
    given = None if transposed is None else bool(transposed(path, leaf))
    if np.ndim(leaf) != 2:
        if given:
            raise _no_matrix(path, leaf)
        return False
    by_scale = _input_first_by_scale(leaf)
    wanted = _input_first_by_name(path) if given is None else given
    if by_scale is not None and wanted is not None and by_scale != wanted:
        meant = "[in, out]" if by_scale else "[out, in]"
        raise ValueError(
            f"transposed must agree with the scales of {path!r}, which are shared "
            f"along its inputs if it is {meant}, got {wanted} by "
            f"{'its name' if given is None else 'transposed'}; quantize it along its "
            "inputs, with sites= or QuantSpec(axis=...), or say what it is"
        )
    decided = wanted if by_scale is None else by_scale
    if decided is None:
        raise ValueError(
            f"transposed must say whether {path!r} of shape {np.shape(leaf)} is "
            "[in, out], True, or [out, in], False, got None; pass "
            "transposed=lambda path, leaf: ..."
        )
    return decided


def _input_first_by_name(path: str) -> bool | None:
    last = path.rpartition("/")[2]
    return last in KERNELS if last in (*KERNELS, *TABLES) else None


def _input_first_by_scale(leaf: Any) -> bool | None:
    """Tell by the axis that shares scales, which is that of the inputs."""
    if not isinstance(leaf, QuantizedArray):
        return None
    (rows, columns), (few_rows, few_columns) = leaf.shape, leaf.scale.shape
    if (few_rows < rows) == (few_columns < columns):
        return None
    return few_rows < rows


def _turned(name: str, leaf: Any) -> Any:
    if leaf.ndim != 2:
        raise _no_matrix(name, leaf)
    if isinstance(leaf, QuantizedArray):
        return leaf.after("transpose", {"permutation": (1, 0)}, ())
    return leaf.T


def _no_matrix(path: str, leaf: Any) -> ValueError:
    return ValueError(
        f"transposed must choose matrices, got {path!r} of shape {np.shape(leaf)}; "
        "leave it out"
    )
