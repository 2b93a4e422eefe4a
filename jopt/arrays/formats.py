"""What a code can mean: the grids on which quantized numbers lie.

A format is a finite set of *levels* and a code for each. A number is stored as the code
of a level, and a scale says how large a level is:

    w ~ level(code) * scale                       (minus a zero point where asymmetric)

Integer formats have the levels -2^(b-1) ... 2^(b-1) - 1 (unsigned 0 ... 2^b - 1), of
which symmetric specs leave the lowest unused: int8 then has -127 ... 127. Float
formats have those of a sign, an exponent and a mantissa, codebooks any table. The
microscaling formats fix, beside the levels, how many elements share a scale and which
numbers a scale may be.

`binary` is the one grid without a zero: every weight becomes plus or minus the scale,
zeros too (only a group of nothing but zeros, whose scale is 0, stays zero). Do not
combine it with pruning.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
    OCP Microscaling Formats (MX) Specification v1.0; Rouhani et al., arXiv:2310.10537.
    NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149.
    Dettmers et al., QLoRA, arXiv:2305.14314 (nf4, appendix E).
    Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764 (ternary by the mean magnitude).
    Rastegari et al., XNOR-Net, arXiv:1603.05279 (binary by the mean magnitude).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "Format",
    "binary",
    "decode_levels",
    "encode_levels",
    "fp4_e2m1",
    "fp8_e4m3",
    "fp8_e5m2",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "mxfp4",
    "mxfp8",
    "nf4",
    "nvfp4",
    "ternary",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "uint8",
]


@dataclasses.dataclass(frozen=True)
class Format:
    """The levels of a number format, and the scales it prescribes.

    Attributes:
        name: its name in this module.
        bits: of a code.
        kind: "integer", "codebook" (the levels are `values`) or "float".
        signed: whether levels below zero exist.
        max_value: the largest level that a scale is computed for.
        values: the level of each code in turn, for formats that have a table.
        mantissa_bits: of a float format.
        min_exponent: of a float format's smallest normal number.
        code_type: name of the dtype that holds one code.
        scale_rule: "range" (the largest magnitude goes to `max_value`) or "mean" (the
            scale is the mean magnitude).
        group_size: elements that share a scale, where the format prescribes it.
        scale_type: name of the dtype of scales, where the format prescribes it.
    """

    name: str
    bits: int
    kind: Literal["integer", "codebook", "float"]
    signed: bool
    max_value: float
    values: tuple[float, ...] = ()
    mantissa_bits: int = 0
    min_exponent: int = 0
    code_type: str = "uint8"
    scale_rule: Literal["range", "mean"] = "range"
    group_size: int | None = None
    scale_type: str | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def code_dtype(self) -> np.dtype:
        """The dtype that holds one unpacked code."""
        return jnp.dtype(self.code_type)

    @property
    def min_value(self) -> float:
        """The smallest level above zero."""
        if self.kind == "integer":
            return 1.0
        if self.kind == "codebook":
            return min(abs(v) for v in self.values if v)
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def max_error(self) -> float:
        """How far a number of a group can be from its level, in units of the scale.

        Half the widest gap between levels, or what reaches beyond the largest level
        where a scale is a power of two, rounded down. Infinite for mean scales, which
        clip numbers of any size.
        """
        if self.scale_rule == "mean":
            return float("inf")
        if self.kind == "integer":
            return 0.5
        exponent = int(np.floor(np.log2(self.max_value)))
        beyond = 2.0 ** (exponent + 1) - self.max_value
        if self.kind == "codebook":
            gap = float(np.max(np.diff(self.values)))
        else:
            gap = 2.0 ** (exponent - self.mantissa_bits)
        return max(gap / 2, beyond if self.scale_type == "float8_e8m0fnu" else 0.0)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Beyond these, half a step outside of the end levels, rounding clips."""
        if self.kind == "codebook":
            low, second, *_ = self.values
            *_, last, high = self.values
            return low - (second - low) / 2, high + (high - last) / 2
        if self.kind == "float":
            exponent = int(np.floor(np.log2(self.max_value)))
            high = self.max_value + 2.0 ** (exponent - self.mantissa_bits - 1)
            return -high, high
        low = -self.max_value if self.signed else 0.0
        return low - 0.5, self.max_value + 0.5


def _integer(bits: int, *, signed: bool) -> Format:
    return Format(
        name=f"int{bits}" if signed else f"uint{bits}",
        bits=bits,
        kind="integer",
        signed=signed,
        max_value=2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1,
        code_type="int8" if signed else "uint8",
    )


def _codebook(
    name: str, bits: int, values: tuple[float, ...], rule: Literal["range", "mean"]
) -> Format:
    return Format(name, bits, "codebook", True, 1.0, values, scale_rule=rule)


int2, int3, int4, int5, int6, int7, int8 = (
    _integer(bits, signed=True) for bits in range(2, 9)
)
uint2, uint3, uint4, uint5, uint6, uint7, uint8 = (
    _integer(bits, signed=False) for bits in range(2, 9)
)
ternary = _codebook("ternary", 2, (-1.0, 0.0, 1.0), "mean")
binary = _codebook("binary", 1, (-1.0, 1.0), "mean")
# Quantiles of the normal distribution, an exact zero among them.
_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    + (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    + (0.07958029955625534, 0.16093020141124725, 0.24611230194568634)
    + (0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
    + (0.7229568362236023, 1.0)
)
nf4 = _codebook("nf4", 4, _NF4, "range")
fp8_e4m3 = Format(
    name="fp8_e4m3",
    bits=8,
    kind="float",
    signed=True,
    max_value=448.0,
    mantissa_bits=3,
    min_exponent=-6,
    code_type="float8_e4m3fn",
)
fp8_e5m2 = Format(
    name="fp8_e5m2",
    bits=8,
    kind="float",
    signed=True,
    max_value=57344.0,
    mantissa_bits=2,
    min_exponent=-14,
    code_type="float8_e5m2",
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
fp4_e2m1 = Format(
    name="fp4_e2m1",
    bits=4,
    kind="float",
    signed=True,
    max_value=6.0,
    values=_E2M1 + tuple(-v for v in _E2M1),  # the top bit of a code is the sign
    mantissa_bits=1,
    min_exponent=0,
)
mxfp8 = dataclasses.replace(
    fp8_e4m3, name="mxfp8", group_size=32, scale_type="float8_e8m0fnu"
)
mxfp4 = dataclasses.replace(
    fp4_e2m1, name="mxfp4", group_size=32, scale_type="float8_e8m0fnu"
)
nvfp4 = dataclasses.replace(
    fp4_e2m1, name="nvfp4", group_size=16, scale_type="float8_e4m3fn"
)


def decode_levels(codes: jax.Array, format: Format) -> jax.Array:
    """Read codes as levels.

    Args:
        codes: unpacked codes of `format.code_dtype`, any shape.
        format: their format.

    Returns:
        float32 levels of the same shape, without scale or zero point.

    >>> decode_levels(jnp.array([0, 5, 15], jnp.uint8), fp4_e2m1)
    Array([ 0.,  3., -6.], dtype=float32)
    """
    if not format.values:
        return codes.astype(jnp.float32)
    # Selecting by one bit of the code after the other fuses with what uses the levels;
    # reading a table would not.
    padding = (0.0,) * (2**format.bits - len(format.values))
    table: list[Any] = [np.float32(v) for v in format.values + padding]
    for bit in range(format.bits):
        is_set = (codes >> np.uint8(bit)) & np.uint8(1) != 0
        table = [
            jnp.where(is_set, above, below)
            for below, above in zip(table[::2], table[1::2], strict=True)
        ]
    return table[0]


def encode_levels(levels: jax.Array, format: Format) -> jax.Array:
    """Return the codes of levels, the inverse of `decode_levels`.

    Args:
        levels: float32 numbers that lie on the grid of `format`, any shape.
        format: the format.

    Returns:
        Codes of `format.code_dtype`, of the same shape.

    >>> encode_levels(jnp.array([0.0, 3.0, -6.0]), fp4_e2m1)
    Array([ 0,  5, 15], dtype=uint8)
    """
    if not format.values:
        return levels.astype(format.code_dtype)
    if format.kind == "codebook":
        return _count_reached(levels, format.values[1:])
    half = len(format.values) // 2
    magnitudes = _count_reached(jnp.abs(levels), format.values[1:half])
    bits = lax.bitcast_convert_type(levels, jnp.uint32)
    sign = (bits >> (32 - format.bits)).astype(jnp.uint8) & np.uint8(half)
    return magnitudes | sign


def _count_reached(levels: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """Count for each level how many of the ascending values it reaches."""
    reached = [(levels >= np.float32(v)).astype(jnp.uint8) for v in values]
    return sum(reached[1:], reached[0])
