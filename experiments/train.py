"""One training loop: any model, any Optax transformation, any loss, one or many
devices.

    grads -> tx.update -> optax.apply_updates

jitted, params and state donated, data-parallel over all devices in one of three ways:

    jit        global arrays: params replicated, the batch split by `NamedSharding`
    shard_map  one program per device, gradients averaged by `pmean`
    pmap       the same with a leading device axis

They agree up to the order of sums. Every `save_every` steps params, state, step and the
seconds spent are one checkpoint; a run that was killed goes on from the newest intact
one and ends with the same bits, because batches are a function of the step. Metrics go
to a JSONL file (cut back to the checkpoint on resume) and to TensorBoard.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter

import jopt

Parallel = Literal["jit", "shard_map", "pmap"]
# (params, batch, extras) -> (mean loss, metrics); extras: a teacher's params, or None.
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
Step = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how parallel."""

    steps: int
    batch_size: int = 64
    parallel: Parallel = "jit"
    log_every: int = 10
    save_every: int = 100


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled step and how to put things on devices for it."""

    step: Step
    replicate: Callable[[Any], Any]
    split: Callable[[Any], Any]
    first: Callable[[Any], Any]  # a replicated tree as one copy


def make_trainer(
    loss: Loss, tx: optax.GradientTransformation, *, parallel: Parallel = "jit"
) -> Trainer:
    """Build the step `(params, state, extras, batch) -> (params, state, metrics)`."""
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def step(params, state, extras, batch, axis=None):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            params, batch, extras
        )
        if axis is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis)
        updates, state = tx.update(grads, state, params)
        metrics |= {"gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), state, metrics

    def per_device(params, state, extras, batch):
        return step(params, state, extras, batch, axis="data")

    if parallel == "pmap":
        count = len(devices)
        return Trainer(
            jax.pmap(per_device, axis_name="data", donate_argnums=(0, 1)),
            lambda tree: jax.tree.map(lambda x: jnp.stack([x] * count), tree),
            lambda tree: jax.tree.map(
                lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), tree
            ),
            lambda tree: jax.tree.map(lambda x: x[0], tree),
        )
    if parallel == "shard_map":
        whole, part = PartitionSpec(), PartitionSpec("data")
        mapped = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(whole, whole, whole, part),
            out_specs=(whole, whole, whole),
            check_vma=False,
        )
    elif parallel == "jit":
        mapped = step
    else:
        raise ValueError(f"parallel must be jit, shard_map or pmap, got {parallel!r}")
    return Trainer(
        jax.jit(mapped, donate_argnums=(0, 1)),
        # A copy, because donation must not eat the caller's arrays.
        lambda tree: jax.device_put(jax.tree.map(jnp.copy, tree), everywhere),
        lambda tree: jax.device_put(tree, by_example),
        lambda tree: tree,
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves."""

    params: Any
    state: Any
    seconds: float  # of training, compilation included, over all restarts


def fit(
    trainer: Trainer,
    tx: optax.GradientTransformation,
    params: Any,
    batches: Callable[[int], Any],
    config: TrainConfig,
    *,
    directory: Path,
    extras: Any = None,
    probe: Callable[[Any, Any], dict[str, float]] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Result:
    """Train for `config.steps` steps, or what is left of them.

    `batches(step)` is the batch of a step, `probe(params, state)` adds metrics at log
    steps, `on_step(steps done)` is told of progress.
    """
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size must be a multiple of the {jax.device_count()} devices, "
            f"got {config.batch_size}"
        )
    checkpoints = directory / "checkpoints"
    begin, spent = 0, 0.0
    fresh = {"params": params, "state": jax.jit(tx.init)(params)}
    if jopt.steps(checkpoints):
        tree = {**fresh, "step": 0, "seconds": 0.0}
        saved = jopt.restore(checkpoints, like=tree)
        fresh, begin, spent = saved, saved["step"], saved["seconds"]
    carry = [trainer.replicate(fresh[key]) for key in ("params", "state")]
    extras = trainer.replicate(extras)
    on_step(begin)
    with contextlib.closing(MetricsLog(directory, begin)) as log:
        start = time.perf_counter()
        for step in range(begin, config.steps):
            *carry, metrics = trainer.step(*carry, extras, trainer.split(batches(step)))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                values = jax.device_get(trainer.first(metrics))
                if probe is not None:
                    values |= probe(*(trainer.first(tree) for tree in carry))
                log.write(done, {key: float(value) for key, value in values.items()})
                on_step(done)
            if done % config.save_every == 0 and done < config.steps:
                jax.block_until_ready(carry)
                tree = {
                    "params": trainer.first(carry[0]),
                    "state": trainer.first(carry[1]),
                    "step": done,
                    "seconds": spent + time.perf_counter() - start,
                }
                jopt.save(checkpoints, tree, step=done, max_to_keep=2)
    params, state = jax.block_until_ready([trainer.first(tree) for tree in carry])
    return Result(params, state, spent + time.perf_counter() - start)


class MetricsLog:
    """A JSONL file and a TensorBoard run that a restart continues without overlap."""

    def __init__(self, directory: Path, begin: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= begin]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(draft, self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=begin + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self.file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file, without a last line that was cut short."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def zero_fraction(params: Any) -> float:
    """Return the fraction of exact zeros among all leaves with two axes or more."""
    leaves = [x for x in jax.tree.leaves(params) if x.ndim >= 2]
    zeros = sum(int(np.sum(np.asarray(x) == 0)) for x in leaves)
    return zeros / sum(x.size for x in leaves)
