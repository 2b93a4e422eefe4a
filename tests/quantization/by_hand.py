"""Rounding and GPTQ in float64 NumPy, as the papers write them, for integer formats."""

import dataclasses

import ml_dtypes
import numpy as np

SHARES = np.linspace(1.0, 0.45, 12, dtype=np.float32)  # that `gptq` tries
RANGE = [np.float32(1.0)]


def all_codes(spec):
    """Return the spec that methods which choose codes once make of one."""
    is_open = spec.narrow_range is None and spec.symmetric
    if not is_open or spec.format.kind != "integer":
        return spec
    return dataclasses.replace(spec, narrow_range=False)


def scale_by_hand(rows, spec, share=1.0):
    """Return scale and zero point of each output, of a share of the range of rows."""
    bits = spec.format.bits
    bfloat16 = spec.scale_dtype == ml_dtypes.bfloat16
    share = np.float32(share)
    low = share * np.minimum(rows.min(0), 0).astype(np.float32)
    high = share * np.maximum(rows.max(0), 0).astype(np.float32)
    if spec.symmetric and spec.narrow_range is False:
        scale = np.where(high > -low, -high, -low) / np.float32(2 ** (bits - 1))
        return (_nearest(scale) if bfloat16 else scale), np.zeros_like(scale)
    if spec.symmetric:
        scale = np.maximum(-low, high) / np.float32(2 ** (bits - 1) - 1)
        return (_nearest(scale) if bfloat16 else scale), np.zeros_like(scale)
    top = np.float32(2**bits - 1)
    scale = high / top - low / top
    scale = _up(scale) if bfloat16 else scale
    lowest = -(2 ** (bits - 1)) if spec.format.signed else 0
    return scale, np.clip(np.rint(lowest - low / scale), lowest, lowest + top)


def fitted_by_hand(rows, spec, shares):
    """Return the scales of the share of the range with the least squared error."""
    wide, least = rows.astype(np.float64), np.inf
    for share in shares:
        scale, zero_point = scale_by_hand(rows, spec, share)
        codes = codes_by_hand(wide, scale, zero_point, spec)
        lost = np.square(wide - (codes - zero_point) * scale).sum(0)
        if share == shares[0]:
            best = scale, zero_point
        pairs = zip((scale, zero_point), best, strict=True)
        best = tuple(np.where(lost < least, new, old) for new, old in pairs)
        least = np.minimum(lost, least)
    return best


def _nearest(scale):
    return scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def _up(scale):
    pattern = scale.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)
    return (pattern & np.uint32(0xFFFF0000)).view(np.float32)


def codes_by_hand(w, scale, zero_point, spec):
    """Return the codes of numbers under scales."""
    bits = spec.format.bits
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if spec.format.signed else (0, 2 * half - 1)
    if spec.symmetric and spec.narrow_range is not False:
        low = -high
    return np.clip(np.rint(w / scale) + zero_point, low, high)


def round_by_hand(weights, spec):
    """Round to nearest: values and codes."""
    size = spec.group_size or len(weights)
    values, codes = np.zeros(weights.shape), np.zeros(weights.shape)
    for start in range(0, len(weights), size):
        part = slice(start, start + size)
        scale, zero_point = scale_by_hand(weights[part], spec)
        codes[part] = codes_by_hand(weights[part], scale, zero_point, spec)
        values[part] = (codes[part] - zero_point) * scale
    return values, codes


def gptq_by_hand(
    weights,
    gram,
    spec,
    *,
    activation_order=False,
    static_groups=False,
    damping=0.01,
    shares=SHARES,
):
    """Quantize [inputs, outputs] by arXiv:2210.17323: values and codes."""
    w, h = weights.astype(np.float64), gram.astype(np.float64)
    size = spec.group_size or len(w)
    dead = np.diag(h) == 0
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(w))
    h[dead, dead] = 1
    order = np.arange(len(w))
    if activation_order:
        order = np.argsort(-np.diag(gram), kind="stable")
    static = [
        fitted_by_hand(weights[i : i + size], spec, shares)
        for i in range(0, len(w), size)
    ]
    w, h = w[order], h[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    values, codes = np.zeros(w.shape), np.zeros(w.shape)
    for i in range(len(w)):
        if activation_order or static_groups or spec.group_size is None:
            scale, zero_point = static[order[i] // size]
        elif i % size == 0:
            scale, zero_point = fitted_by_hand(w[i : i + size], spec, shares)
        codes[i] = codes_by_hand(w[i], scale, zero_point, spec)
        values[i] = (codes[i] - zero_point) * scale
        w[i:] -= np.outer(upper[i, i:], (w[i] - values[i]) / upper[i, i])
    back = np.argsort(order)
    return values[back], codes[back]
