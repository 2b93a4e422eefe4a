"""Codes in words of 32 bits, and the names of the layouts that hold them."""

from typing import Any

import numpy as np

from jopt.arrays.packing import pack_codes, unpack_codes
from jopt.trees.container import Array

Weights = dict[str, Any]  # JSON: num_bits, type, symmetric, strategy, group_size ...

METHOD = "compressed-tensors"
PACKED, INT, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"
CONFIG, KEY = "config.json", "quantization_config"


def pack_words(codes: Array, bits: int, *, axis: int) -> Array:
    """Pack signed codes, shifted to be positive, into int32 words along an axis.

    Args:
        codes: int8, a matrix.
        bits: of a code.
        axis: along which codes share words.

    Returns:
        int32 with `ceil(size * bits / 32)` words along the axis.

    >>> pack_words(np.array([[-8, -7, 7]], np.int8), 4, axis=1)
    array([[3856]], dtype=int32)
    """
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    lines = np.moveaxis(np.asarray(pack_codes(shifted, bits, axis=axis)), axis, -1)
    lines = np.pad(lines, [(0, 0), (0, -lines.shape[-1] % 4)])
    return np.moveaxis(np.ascontiguousarray(lines).view("<i4"), -1, axis)


def unpack_words(words: Array, bits: int, size: int, *, axis: int) -> Array:
    """Return the signed codes that `pack_words` packed.

    Args:
        words: int32, a matrix.
        bits: of a code.
        size: how many codes there are along the axis.
        axis: along which codes share words.

    Returns:
        int8 codes.

    >>> unpack_words(np.array([[3856]], np.int32), 4, 3, axis=1)
    array([[-8, -7,  7]], dtype=int8)
    """
    lines = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)
    lines = lines[:, : -(-size * bits // 8)]
    codes = np.asarray(unpack_codes(lines, bits, size, axis=-1, signed=False))
    signed = (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return np.moveaxis(signed, -1, axis)
