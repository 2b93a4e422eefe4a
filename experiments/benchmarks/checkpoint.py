"""Checkpoints: 100 random damages, speed against bare Orbax, and bytes on disk.

    python -m experiments.benchmarks.checkpoint --out FILE.json

Damage: three steps are saved, and in a fifth of the cases only one; one random damage
is done (a flipped byte, a cut file, a missing file, a stray directory), and the newest
step is restored.
The outcome must be the newest values, an intact earlier step with a warning that names
what is damaged, or one error. Any other values count as wrong; there must be none. The
same damages are done to bare Orbax for comparison.

Speed: megabytes of array data per second, save and restore, ours and Orbax's
`PyTreeCheckpointer` in turn; and of the checksum alone.

Size: bytes on disk over bytes of array data, dense and with 90 % zeros, large leaves
and many small ones.
"""

import collections
import dataclasses
import logging
import random
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

import jopt
from experiments.benchmarks import measure

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    out: Path | None = None
    num_damages: int = 100
    megabytes: int = 64
    rounds: int = 5


def save_orbax(path: Path, tree: Any, step: int) -> None:
    """Save with bare Orbax."""
    with ocp.CheckpointManager(path) as manager:
        manager.save(step, args=ocp.args.StandardSave(tree))


def restore_orbax(path: Path) -> Any:
    """Restore the newest step with bare Orbax."""
    with ocp.CheckpointManager(path) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return manager.restore(None, args=ocp.args.StandardRestore())


def save_ours(path: Path, tree: Any, step: int) -> None:
    """Save with this library."""
    jopt.save(path, tree, step=step)


LIBRARIES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "jopt": (save_ours, jopt.restore),
    "orbax": (save_orbax, restore_orbax),
}


def tree_of(step: int) -> dict[str, Any]:
    """Make a tree whose every value tells the step."""
    rng = np.random.default_rng(step)
    pruned = np.where(rng.random((128, 256)) < 0.9, 0, rng.normal(size=(128, 256)))
    return {
        "params": {
            "pruned": jnp.asarray(pruned, jnp.float32),
            "dense": jnp.asarray(rng.normal(size=(200, 128)), jnp.bfloat16),
            "codes": jnp.asarray(rng.integers(0, 256, (300, 256)), jnp.uint8),
            "bias": jnp.asarray(rng.normal(size=64), jnp.float32),
        },
        "count": jnp.int32(step),
    }


def equal(found: Any, expected: Any) -> bool:
    """Compare two trees bit for bit."""
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


def outcomes(
    save: Callable[..., None], restore: Callable[..., Any], count: int
) -> dict[str, Any]:
    """Damage checkpoints `count` times and count what restoring them gives."""
    expected = [tree_of(step) for step in range(STEPS)]
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        intact = Path(folder) / "intact"
        for step, tree in enumerate(expected):
            save(intact, tree, step)
        for seed in range(count):
            path = Path(folder) / str(seed)
            shutil.copytree(intact, path)
            if seed % 5 == 0:  # no earlier step to go back to
                for step in range(STEPS - 1):
                    shutil.rmtree(path / str(step))
            kind, named = damage(path, random.Random(seed))
            tally[f"{kind}: {outcome(restore, path, expected, named)}"] += 1
            shutil.rmtree(path)
    wrong = sum(n for name, n in tally.items() if "wrong" in name)
    return {"tried": count, "wrong": wrong, **dict(sorted(tally.items()))}


def damage(path: Path, rng: random.Random) -> tuple[str, str]:
    """Damage one thing, mostly in the newest step; return the kind and its name."""
    kind = rng.choice(["flipped byte", "cut file", "missing file", "stray directory"])
    if kind == "stray directory":
        stray = path / rng.choice(["9", "07", "2.orbax-checkpoint-tmp", "tmp", "2/x"])
        stray.mkdir(parents=True, exist_ok=True)
        return kind, stray.name
    present = sorted(path.glob("[0-2]"))[-2:]
    step = rng.choice([present[-1]] * 3 + present)
    files = [file for file in step.rglob("*") if file.is_file()]
    # By size half of the time: most bytes lie in few files.
    weights = [file.stat().st_size + 1 for file in sorted(files)]
    if rng.random() < 0.5:
        weights = [1] * len(files)
    file = rng.choices(sorted(files), weights)[0]
    data = bytearray(file.read_bytes())
    if kind == "missing file":
        file.unlink()
    elif kind == "cut file":
        file.write_bytes(data[: rng.randrange(max(len(data), 1))])
    elif data:
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        file.write_bytes(data)
    return kind, file.name


def outcome(
    restore: Callable[..., Any], path: Path, expected: list[Any], named: str
) -> str:
    """Restore and say what came back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = restore(path)
        # Whatever is raised is the outcome; bare Orbax raises plain Exception.
        except Exception as error:
            return f"error {type(error).__name__}"
    if equal(found, expected[-1]):
        return "newest values"
    if any(equal(found, tree) for tree in expected[:-1]):
        told = any(named in str(warning.message) for warning in caught)
        return "earlier step, named" if told else "earlier step, wrong: in silence"
    return "wrong values"


def speed(megabytes: int, rounds: int) -> dict[str, Any]:
    """Measure megabytes per second of array data, with every file in the page cache."""
    rng = np.random.default_rng(0)
    side = 1024
    count = max(1, megabytes * 10**6 // (4 * side * side))
    dense = [rng.normal(size=(side, side)).astype(np.float32) for _ in range(count)]
    zeros = [np.where(rng.random(x.shape) < 0.9, 0, x) for x in dense]
    results: dict[str, Any] = {"checksum_mb_per_s": checksum_speed(dense[0])}
    for name, arrays in {"dense": dense, "zeros_90": zeros}.items():
        tree = {str(i): jnp.asarray(x) for i, x in enumerate(arrays)}
        size = sum(x.nbytes for x in arrays) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            results[name] = _speed(Path(folder), tree, size, rounds)
    return results


def _speed(folder: Path, tree: Any, size: float, rounds: int) -> dict[str, float]:
    bare = ocp.PyTreeCheckpointer()
    arguments = ocp.checkpoint_utils.construct_restore_args(tree)

    def fresh(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    candidates = {
        "save_jopt": lambda: jopt.save(fresh("jopt"), tree),
        "save_orbax": lambda: bare.save(fresh("orbax"), tree),
        "restore_jopt": lambda: jopt.restore(folder / "jopt"),
        "restore_orbax": lambda: bare.restore(
            folder / "orbax", item=tree, restore_args=arguments
        ),
    }
    seconds = measure.alternate(candidates, rounds=rounds)
    figures = {f"{name}_mb_per_s": size / value for name, value in seconds.items()}
    for kind in ("save", "restore"):
        ratio = seconds[f"{kind}_jopt"] / seconds[f"{kind}_orbax"]
        figures[f"{kind}_time_over_orbax"] = ratio
    bare.close()
    return figures


def checksum_speed(array: np.ndarray) -> float:
    """Measure the checksum that files and leaves get."""
    data = array.reshape(-1).view(np.uint8).data
    best = min(_timed(lambda: zlib.crc32(data)) for _ in range(9))
    return array.nbytes / 1e6 / best


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sizes() -> dict[str, Any]:
    """Measure bytes on disk of typical checkpoints."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(1024, 1024)).astype(np.float32)
    small = {
        f"layer_{i}": {
            "kernel": rng.normal(size=(32, 32)).astype(np.float32),
            "bias": np.zeros(32, np.float32),
            "scale": np.ones(32, np.float32),
        }
        for i in range(60)
    }
    trees = {
        "one leaf, dense": {"w": dense},
        "one leaf, 90 % zeros": {
            "w": np.where(rng.random(dense.shape) < 0.9, 0, dense)
        },
        "180 small leaves": small,
        "nothing": {},
    }
    return {
        name: _sizes(jax.tree.map(jnp.asarray, tree)) for name, tree in trees.items()
    }


def _sizes(tree: Any) -> dict[str, float]:
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    found: dict[str, float] = {"data_bytes": data}
    for name, (save, _) in LIBRARIES.items():
        if name == "orbax" and not data:
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "x", tree, 0)
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            found[f"{name}_bytes"] = sum(file.stat().st_size for file in files)
            found[f"{name}_files"] = len(files)
    return found


def main(config: Config) -> None:
    """Run all and write one record."""
    # Bare Orbax logs pages about damaged files; they are not what is measured.
    logging.disable(logging.CRITICAL)
    damages = {
        name: outcomes(save, restore, config.num_damages)
        for name, (save, restore) in LIBRARIES.items()
    }
    measure.write(
        {
            "damages": damages,
            "speed": speed(config.megabytes, config.rounds),
            "size": sizes(),
        },
        config.out,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
