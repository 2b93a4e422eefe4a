"""What leaves the workshop: files, the functions that run them, and how fast they are.

A float variant ships params, possibly with weights in few bits, and runs in floats. The
int8 x int8 variants ship codes and run them as codes: `jopt.execute`.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jopt
from experiments import models
from experiments.variants import INT8, Variant

CALIBRATION_BATCHES, PERCENTILE = 8, 99.99


def bytes_on_disk(folder: Path) -> int:
    """Add up the files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def deployed(apply: models.Apply, variant: Variant) -> models.Apply:
    """Return the function that runs what `ship` returns."""
    if variant.activations is None:
        return apply

    def run(shipped: Any, x: jax.Array) -> jax.Array:
        ranges = shipped.get("calibration", INT8)
        return jopt.execute(apply, activations=ranges)(shipped["params"], x)

    return run


def ship(
    variant: Variant,
    apply: models.Apply,
    params: Any,
    state: Any,
    batches: Iterable[Any],
    folder: Path,
) -> Any:
    """Save what is deployed, read it back, and return it for `deployed` to run."""
    if variant.activations is None:
        return _ship_floats(variant, params, state, folder)
    batches = list(batches)
    table = jopt.sites(apply, params, batches[0])
    tree = {"params": jopt.quantize(params, INT8, sites=table)}
    if variant.activations == "static":
        observer = jopt.observers.percentile(PERCENTILE)
        tree["calibration"] = jopt.calibrate(apply, params, batches, observer=observer)
    jopt.save(folder, tree, overwrite=True)
    return jopt.restore(folder)


def _ship_floats(variant: Variant, params: Any, state: Any, folder: Path) -> Any:
    packed = params
    if variant.spec is not None:
        packed = jopt.quantize(params, variant.spec, scales=jopt.get_scales(state))
    jopt.save(folder, packed, overwrite=True)
    shipped = jopt.dequantize(jopt.restore(folder))
    for a, b in zip(jax.tree.leaves(shipped), jax.tree.leaves(params), strict=True):
        if not bool(jnp.array_equal(a, b)):
            raise RuntimeError(
                f"what {variant.name} ships differs from what it trained"
            )
    return shipped


def flops(apply: models.Apply, params: Any, x: jax.Array) -> int:
    """Count the floating point or integer operations of one example."""
    return jopt.sites(apply, params, x[:1]).flops


def milliseconds(
    programs: dict[str, tuple[models.Apply, Any]], x: jax.Array, *, rounds: int = 40
) -> dict[str, float]:
    """Time one batch through every program, in turns; medians."""
    compiled: dict[str, Callable[[], Any]] = {}
    for name, (run, params) in programs.items():
        function = jax.jit(run).lower(params, x).compile()
        compiled[name] = lambda function=function, params=params: function(params, x)
        jax.block_until_ready(compiled[name]())
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, call in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
