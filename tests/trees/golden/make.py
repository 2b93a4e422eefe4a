"""The trees of the golden files; run it to write them anew for a new format version.

python -m tests.trees.golden.make
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jopt
from jopt.arrays.quantized import Scale, quantize_array

HERE = pathlib.Path(__file__).parent


def numbers(*shape):
    """Return float32 multiples of 1/8 from -3.5 to 3.5, without a random generator."""
    size = int(np.prod(shape))
    return (((np.arange(size) * 37) % 57 - 28) / 8).astype(np.float32).reshape(shape)


def vectors():
    """Return small quantized arrays of each kind that a reader must tell apart."""
    spec, formats = jopt.QuantSpec, jopt.formats
    w = numbers(4, 3)
    int4 = jopt.quantize(w, spec(formats.int4, group_size=2))
    grid = Scale(jnp.full((1, 3), 0.5, jnp.bfloat16))
    rows = jopt.quantize(numbers(8, 2), spec(formats.uint4, symmetric=False, axis=1))
    return {
        "int4": int4,
        "int4_nk": quantize_array(w, spec(formats.int4, group_size=2), order="nk"),
        "int3": jopt.quantize(numbers(5, 2), spec(formats.int3)),
        "int8": quantize_array(w, spec(formats.int8), scale=grid),
        "uint4": jopt.quantize(
            w + 1, spec(formats.uint4, symmetric=False, scale_dtype=jnp.float32)
        ),
        "nf4": jopt.quantize(w, spec(formats.nf4, axis=())),
        "ternary": jopt.quantize(w, spec(formats.ternary)),
        "fp8_e4m3": jopt.quantize(w, spec(formats.fp8_e4m3)),
        "mxfp4": jopt.quantize(numbers(32, 2), spec(formats.mxfp4)),
        "nvfp4": jopt.quantize(numbers(16, 2), spec(formats.nvfp4)),
        "ordered": dataclasses.replace(
            rows,
            permutation=jnp.array([3, 1, 0, 2, 7, 6, 5, 4], jnp.int32),
            input_scale=jnp.array([[1.0], [2.0], [4.0], [0.5]] * 2, jnp.float32),
        ),
    }


def everything():
    """Return a tree of all else that a file can hold."""
    return {
        "layers": [{"kernel": jnp.asarray(numbers(2, 3)), "bias": jnp.zeros(3)}] * 2,
        "half": jnp.asarray(numbers(3), jnp.bfloat16),
        "eighth": jnp.asarray(numbers(3), jnp.float8_e4m3fn),
        "bits": jnp.array([[1, -2, 3], [-8, 7, 0]], jnp.int4),
        "mask": jnp.array([True, False]),
        "numpy": np.arange(3, dtype=np.int64),
        "wide": np.array([1 + 2j]),
        "key": jax.random.key(7),
        "tuple": (1, 2.5, None, "text", b"bytes", True, np.float32(0.1), 2j),
        "empty": [{}, (), jnp.zeros((0, 2))],
        "a/b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
        "index": {7: "seven"},
    }


if __name__ == "__main__":
    jopt.save(HERE / "vectors.safetensors", vectors(), overwrite=True)
    jopt.save(
        HERE / "everything.safetensors",
        everything(),
        metadata={"note": "all kinds"},
        overwrite=True,
    )
