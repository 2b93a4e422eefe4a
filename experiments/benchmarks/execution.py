"""What int8 execution costs against float32, end to end.

    python -m experiments.benchmarks.execution --out FILE.json

A dense layer and a convolution, as `jopt.execute` runs them: the input is rounded (with
a range per token, or a static one), codes are multiplied in int32 and scaled. Beside
them float32, and XLA's plain product of codes without rounding and scaling: the limit
for many rows, and what is to be avoided for one. All candidates of a shape alternate in
one process.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import jopt
from experiments.benchmarks import measure

INT8 = jopt.QuantSpec(jopt.formats.int8)
DOTS = ((64, 1024), (512, 1024), (64, 4096), (1, 1024), (1, 4096))
CONVS = (  # images, size, inputs, outputs, window, stride
    (64, 32, 16, 16, 3, 1),
    (64, 16, 32, 32, 3, 1),
    (64, 8, 64, 64, 3, 1),
    (64, 32, 16, 32, 3, 2),
    (64, 32, 16, 32, 1, 1),
    (1, 32, 16, 16, 3, 1),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How often to measure."""

    out: Path | None = None
    rounds: int = 15


def normal(*shape: int) -> jax.Array:
    """Draw numbers."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def compiled(function, *args):
    """Compile a call."""
    run = jax.jit(function).lower(*args).compile()
    return lambda: run(*args)


def executed(apply, params, x):
    """Return the int8 candidates by name."""
    table = jopt.sites(apply, params, x)
    calibration = jopt.calibrate(apply, params, [x], progress=False)
    packed = jopt.quantize(params, INT8, sites=table)
    found = {}
    for name, ranges in (("dynamic", INT8), ("static", calibration)):
        run = jopt.execute(apply, activations=ranges)
        found[f"int8_{name}"] = compiled(run, packed, x)
    return found


def dense(params, x):
    """Multiply."""
    return x @ params["w"]


def compare(apply, params, x, rounds: int, **others):
    """Time one layer."""
    candidates = {"float32": compiled(apply, params, x), **others}
    candidates |= executed(apply, params, x)
    medians = measure.alternate(candidates, rounds=rounds, warmup=2)
    result = {"milliseconds": {name: 1e3 * s for name, s in medians.items()}}
    for base in ("float32", *others):
        result[f"over_{base}"] = {n: medians[base] / s for n, s in medians.items()}
    return result


def time_dot(rows: int, size: int, rounds: int):
    """Time a dense layer of size x size."""
    params, x = {"w": normal(size, size)}, normal(rows, size)
    codes = [jnp.round(a * 30).astype(jnp.int8) for a in (x, params["w"])]
    numbers = (((1,), (0,)), ((), ()))
    product = compiled(
        lambda a, b: lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32),
        *codes,
    )
    return compare(dense, params, x, rounds, plain_int8=product)


def time_conv(shape, rounds: int):
    """Time a convolution."""
    images, size, inputs, outputs, window, stride = shape

    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    params = {"w": normal(window, window, inputs, outputs)}
    return compare(apply, params, normal(images, size, size, inputs), rounds)


def main(config: Config) -> None:
    """Run all shapes and write one record."""
    results = {
        "dots": {
            f"{rows}x{size}x{size}": time_dot(rows, size, config.rounds)
            for rows, size in DOTS
        },
        "convolutions": {
            "x".join(map(str, shape)): time_conv(shape, config.rounds)
            for shape in CONVS
        },
        "floors": {
            "over_float32, 64 rows or more": 1.3,
            "over_plain_int8, one row": 5,
        },
    }
    measure.write(results, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
