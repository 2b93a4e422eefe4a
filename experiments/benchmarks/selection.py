"""Exact masks without sorting: against argsort, `np.partition` and one read.

    python -m experiments.benchmarks.selection --out FILE.json

The baseline ranks as JaxPruner does: `argsort` of the flat scores, and two argsorts of
every group for N:M. Ours and the baselines run alternately; medians and ratios. Each
mask is compared with a stable sort first. The temporary memory is the compiled
program's own account. Where there are several devices, as with

    XLA_FLAGS=--xla_force_host_platform_device_count=8

the mask of sharded scores is compared with that of one device instead, bit by bit.
"""

import dataclasses
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jopt
from experiments.benchmarks import measure


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    out: Path | None = None
    sizes: tuple[int, ...] = (1_000_000, 10_000_000)
    sparsity: float = 0.9
    rounds: int = 7
    leaves: int = 100
    leaf_size: int = 100_000
    only_host_update: bool = False


def argsort_mask(scores: jax.Array, sparsity: float) -> jax.Array:
    """Keep the last of a full sort."""
    num_pruned = round(scores.size * sparsity)
    order = jnp.argsort(scores.reshape(-1))
    mask = jnp.ones(scores.size, bool).at[order[:num_pruned]].set(False)
    return mask.reshape(scores.shape)


def double_argsort_mask(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Keep n of every m of the last axis by the ranks of a sort in each group."""
    groups = scores.reshape(-1, m)
    ranks = jnp.argsort(jnp.argsort(-groups, axis=-1), axis=-1)
    return (ranks < n).reshape(scores.shape)


def make_scores(size: int) -> dict[str, np.ndarray]:
    """Draw the kinds of scores that are timed."""
    normal = np.random.default_rng(0).normal(size=size).astype(np.float32)
    return {
        "normal": normal,
        "half_normal": np.abs(normal),
        "sixteen_values": np.round(normal * 2).clip(-8, 7),
        "half_zeros": np.maximum(normal, 0),
        "bfloat16": np.abs(normal).astype(jnp.bfloat16),
    }


def check(mask: jax.Array, scores: np.ndarray) -> None:
    """Compare a mask with a stable sort."""
    kept = int(mask.sum())
    order = np.argsort(-scores.astype(np.float32), kind="stable")
    expected = np.zeros(scores.size, bool)
    expected[order[:kept]] = True
    if not np.array_equal(np.asarray(mask), expected):
        raise ValueError("mask must equal a stable sort's: the selection is wrong")


def compile_timed(function, *args):
    """Compile and say how long it took, tracing included."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - start


def temporary_bytes(compiled) -> int:
    """Return the temporary memory that a compiled program asks for."""
    return compiled.memory_analysis().temp_size_in_bytes


def compare_scores(scores: np.ndarray, config: Config) -> dict:
    """Time one kind of scores: ours, argsort, np.partition and one read."""
    array, sparsity = jnp.asarray(scores), config.sparsity
    traced_sparsity = jnp.float32(sparsity)
    ours, seconds = compile_timed(
        lambda scores: jopt.make_mask(scores, sparsity=sparsity), array
    )
    traced, _ = compile_timed(
        lambda scores, sparsity: jopt.make_mask(scores, sparsity=sparsity),
        array,
        traced_sparsity,
    )
    sort, _ = compile_timed(lambda scores: argsort_mask(scores, sparsity), array)
    read, _ = compile_timed(jnp.sum, array)
    check(ours(array), scores)
    check(traced(array, traced_sparsity), scores)
    position = round(scores.size * sparsity)
    keys = scores if scores.dtype == np.float32 else scores.astype(np.float32)
    candidates = {
        "ours": lambda: ours(array),
        "ours_traced": lambda: traced(array, traced_sparsity),
        "read": lambda: read(array),
        "np_partition": lambda: np.partition(keys, position),
    }
    medians = measure.alternate(candidates, rounds=3 * config.rounds)
    sorting = measure.alternate(
        {"ours": candidates["ours"], "argsort": lambda: sort(array)},
        rounds=max(config.rounds // 2, 3),
    )
    return {
        "seconds": {**medians, "argsort": sorting["argsort"]},
        "times_faster_than_argsort": sorting["argsort"] / sorting["ours"],
        "times_faster_than_argsort_traced": sorting["argsort"] / medians["ours_traced"],
        "times_faster_than_np_partition": medians["np_partition"] / medians["ours"],
        "times_one_read": medians["ours"] / medians["read"],
        "temporary_bytes": temporary_bytes(ours),
        "temporary_bytes_argsort": temporary_bytes(sort),
        "compile_seconds": seconds,
    }


def compare_n_of_m(n: int, m: int, config: Config) -> dict:
    """Time an N:M mask along both of the last axes against a double argsort.

    The limit is a pass that reads the scores and writes a mask: `scores > 0`.
    """
    size = max(config.sizes)
    scores = np.random.default_rng(0).normal(size=(size // 4000, 4000))
    array = jnp.asarray(scores.astype(np.float32))
    pattern = {"last": jopt.NM(n, m, axis=-1), "before_last": jopt.NM(n, m, axis=-2)}
    array = array[: array.shape[0] // m * m]
    ours = {
        name: compile_timed(lambda s, p=p: jopt.make_mask(s, pattern=p), array)[0]
        for name, p in pattern.items()
    }
    sort, _ = compile_timed(lambda scores: double_argsort_mask(scores, n, m), array)
    if not bool((ours["last"](array) == sort(array)).all()):
        raise ValueError("mask must equal the double argsort's: the pattern is wrong")
    one_pass, _ = compile_timed(lambda scores: scores > 0, array)
    compiled = {"one_pass": one_pass, **ours, "double_argsort": sort}
    medians = measure.alternate(
        {name: lambda f=f: f(array) for name, f in compiled.items()},
        rounds=config.rounds,
    )
    return {
        "seconds": medians,
        "times_faster": {
            name: medians["double_argsort"] / medians[name] for name in ours
        },
        "times_one_pass": {name: medians[name] / medians["one_pass"] for name in ours},
        "temporary_bytes": {name: temporary_bytes(f) for name, f in ours.items()},
        "temporary_bytes_double_argsort": temporary_bytes(sort),
    }


def global_argsort_masks(params: dict[str, jax.Array], sparsity: float) -> dict:
    """Rank the magnitudes of all leaves by one sort, as JaxPruner does."""
    flat = jnp.concatenate([jnp.abs(w).reshape(-1) for w in params.values()])
    mask, start, masks = argsort_mask(flat, sparsity), 0, {}
    for name, w in params.items():
        masks[name] = mask[start : start + w.size].reshape(w.shape)
        start += w.size
    return masks


def processor_seconds(run) -> float:
    """Return the time of all cores for one call, which a busy machine changes less."""
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def compare_host_update(config: Config) -> dict:
    """Time a global mask update between steps against concatenate-and-argsort.

    It runs first, so that the first call compiles every program that it needs; what it
    takes beyond a later call is what compiling costs. Each round is one sort and
    several updates after it, and the ratio is the median over the rounds.
    """
    rng = np.random.default_rng(0)
    shape = (config.leaf_size // 400, 400)
    params = {
        f"layer_{i}": jnp.asarray(rng.normal(size=shape).astype(np.float32))
        for i in range(config.leaves)
    }
    pruned = jopt.prune(
        optax.sgd(0.1),
        sparsity=config.sparsity,
        allocation=jopt.allocation.global_ranking,
        update="host",
    )
    state = jax.block_until_ready(pruned.init(params))

    def ours():
        return jopt.update_masks(pruned, state, params, count=0)

    start = time.perf_counter()
    new_state = jax.block_until_ready(ours())
    first = time.perf_counter() - start
    sort, sort_compile = compile_timed(
        lambda params: global_argsort_masks(params, config.sparsity), params
    )
    expected, masks = sort(params), jopt.get_masks(new_state)
    if not all(np.array_equal(masks[name], expected[name]) for name in params):
        raise ValueError("masks must equal the sort's: the ranking is wrong")
    rounds = []
    for _ in range(config.rounds):
        timed = measure.alternate({"argsort": lambda: sort(params)}, rounds=1, warmup=0)
        rounds.append({**timed, **measure.alternate({"ours": ours}, rounds=5)})
    ratios = [r["argsort"] / r["ours"] for r in rounds]
    processor = {
        "ours": statistics.median(processor_seconds(ours) for _ in range(9)),
        "argsort": processor_seconds(lambda: sort(params)),
    }
    seconds = {
        name: statistics.median(r[name] for r in rounds) for name in ("ours", "argsort")
    }
    return {
        "leaves": config.leaves,
        "leaf_shape": shape,
        "seconds": seconds,
        "times_faster_than_argsort": statistics.median(ratios),
        "times_faster_of_each_round": ratios,
        "processor_seconds": processor,
        "compile_seconds": first - seconds["ours"],
        "compile_seconds_argsort": sort_compile,
        "temporary_bytes_argsort": temporary_bytes(sort),
    }


def compare_sharded(config: Config) -> dict:
    """Compare the mask of sharded scores with that of one device, bit by bit."""
    scores = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    scores = np.round(scores, 3)  # with ties
    expected = jopt.make_mask(scores, sparsity=config.sparsity)
    results = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
        placed = jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data")))
        mask = jax.jit(lambda s: jopt.make_mask(s, sparsity=config.sparsity))
        compiled = mask.lower(placed).compile()
        shapes = re.findall(r"\[([\d,]*)\]\S* all-gather", compiled.as_text())
        sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
        results[kind.name.lower()] = {
            "bit_identical": bool(np.array_equal(compiled(placed), expected)),
            "largest_all_gather_elements": max(sizes, default=0),
        }
    return {"devices": jax.device_count(), "shape": scores.shape, **results}


def main(config: Config) -> None:
    """Run all comparisons and write them."""
    if jax.device_count() > 1:
        measure.write({"sharded": compare_sharded(config)}, config.out)
        return
    results = {"host_update_global": compare_host_update(config)}
    if config.only_host_update:
        measure.write(results, config.out)
        return
    for size in config.sizes:
        for name, scores in make_scores(size).items():
            print(f"{name}, {size:,} scores", flush=True)
            results[f"{name}_{size}"] = compare_scores(scores, config)
    for n, m in ((2, 4), (4, 8)):
        results[f"{n}_of_{m}"] = compare_n_of_m(n, m, config)
    measure.write(results, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
