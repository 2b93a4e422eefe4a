"""What `jopt.prune` adds to an optimizer step: compile time, step time, state bytes.

    python -m experiments.benchmarks.optimizer_step --out FILE.json

Compile time is that of `tx.init` and `tx.update` together, for 300 leaves of one shape,
over bare `optax.adamw`; every compilation is a fresh function, so nothing is cached.
Step time is that of a step without a mask update, 20M params, everything donated.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

import jopt
from experiments.benchmarks import measure

NEVER = 1 << 30


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    out: Path | None = None
    num_leaves: int = 300
    leaf_shape: tuple[int, int] = (256, 256)
    num_params: int = 20_000_000
    rounds: int = 15
    compile_rounds: int = 3


def compile_seconds(make_tx, params) -> float:
    """Trace, lower and compile init and update."""
    jax.clear_caches()
    tx = make_tx()
    start = time.perf_counter()
    jax.jit(tx.init).lower(params).compile()
    state = jax.eval_shape(tx.init, params)
    jax.jit(tx.update).lower(params, state, params).compile()
    return time.perf_counter() - start


def compare_compile(config: Config) -> dict:
    """Compile each variant in turn, several times."""
    params = {
        f"layer_{i}": jax.ShapeDtypeStruct(config.leaf_shape, jnp.float32)
        for i in range(config.num_leaves)
    }
    makers = {
        "adamw": lambda: optax.adamw(1e-3),
        "step": lambda: jopt.prune(optax.adamw(1e-3), sparsity=0.9, every_steps=100),
        "step_global": lambda: jopt.prune(
            optax.adamw(1e-3),
            sparsity=0.9,
            every_steps=100,
            allocation=jopt.allocation.global_ranking,
        ),
        "host": lambda: jopt.prune(
            optax.adamw(1e-3), sparsity=0.9, every_steps=100, update="host"
        ),
    }
    seconds = {name: [] for name in makers}
    for _ in range(config.compile_rounds):
        for name, make in makers.items():
            seconds[name].append(compile_seconds(make, params))
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "num_leaves": config.num_leaves,
        "seconds": medians,
        "over_adamw": {n: s / medians["adamw"] for n, s in medians.items()},
        "floors": {"step": 6.0, "host": 2.2},
    }


def stepper(tx, params):
    """Return a function that takes one donated step each time it is called."""
    state = tx.init(params)
    # Step 0 is the mask update; the steps that are timed are the others.
    carry = [params, state]
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    memory = compiled.lower(*carry, grads).compile().memory_analysis()

    def run():
        carry[:] = compiled(*carry, grads)
        return carry[0]

    return run, memory.temp_size_in_bytes, state


def compare_step(config: Config, num_leaves: int) -> dict:
    """Time steps without a mask update, bare and pruned in turn."""
    width = 512
    rows = config.num_params // num_leaves // width
    key = jax.random.key(0)

    def fresh():
        return {
            f"layer_{i}": jax.random.normal(jax.random.fold_in(key, i), (rows, width))
            for i in range(num_leaves)
        }

    bare, bare_temp, _ = stepper(optax.adamw(1e-3), fresh())
    tx = jopt.prune(optax.adamw(1e-3), sparsity=0.9, every_steps=NEVER)
    pruned, temp, state = stepper(tx, fresh())
    medians = measure.alternate(
        {"adamw": bare, "pruned": pruned}, rounds=config.rounds, warmup=3
    )
    masks = sum(m.nbytes for m in jax.tree.leaves(state.masks))
    return {
        "num_params": num_leaves * rows * width,
        "num_leaves": num_leaves,
        "milliseconds": {name: 1e3 * s for name, s in medians.items()},
        "ratio": medians["pruned"] / medians["adamw"],
        "floor": 1.3,
        "temp_bytes": {"adamw": bare_temp, "pruned": temp},
        "mask_bits_per_weight": 8 * masks / (num_leaves * rows * width),
    }


def main(config: Config) -> None:
    """Run all and write one record."""
    measure.write(
        {
            "non_update_step": [compare_step(config, n) for n in (1, 20)],
            "compile": compare_compile(config),
        },
        config.out,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
