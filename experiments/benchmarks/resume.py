"""Kill the main job at random moments, run it again, and compare bits.

    python -m experiments.benchmarks.resume --out FILE.json

One run is left alone; another is killed with SIGKILL again and again, each time started
anew in the same folder, and then runs to its end. The params that both ship must be
equal bit for bit.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import jopt
from experiments.benchmarks import measure


@dataclasses.dataclass(frozen=True)
class Config:
    """How often, and on how small a job."""

    out: Path | None = None
    kills: int = 20
    steps: int = 40
    seed: int = 0


def command(folder: Path, steps: int) -> list[str]:
    """Return the command line of a small main job."""
    options = ["--out", str(folder), "--steps", str(steps), "--seeds", "1"]
    options += ["--save-every", "10", "--width", "8"]
    return [sys.executable, "-m", "experiments.compress", *options]


def shipped(folder: Path) -> dict[str, object]:
    """Restore what every run of a folder ships."""
    return {
        str(path.relative_to(folder)): jopt.dequantize(jopt.restore(path))
        for path in sorted(folder.glob("runs/*/seed_*/artefact"))
    }


def is_same(a: object, b: object) -> bool:
    """Compare two trees bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def metrics(folder: Path) -> dict[str, str]:
    """Read the logs of every run of a folder."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("metrics.jsonl"))
    }


def killed(folder: Path, steps: int, moment: float) -> bool:
    """Start the job and kill it after `moment` seconds, unless it has ended."""
    process = subprocess.Popen(
        command(folder, steps),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=moment)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def main(config: Config) -> None:
    """Run, kill, run to the end, compare."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        start = time.perf_counter()
        subprocess.run(command(whole, config.steps), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        broken = [Path(scratch) / "broken_0"]
        moments: list[float] = []
        while len(moments) < config.kills:
            # Anywhere from before the first import to well into a variant or two.
            moment = rng.uniform(0.0, 0.35 * seconds)
            if killed(broken[-1], config.steps, moment):
                moments.append(moment)
            else:  # it finished between two kills: the rest falls on a new job
                broken.append(Path(scratch) / f"broken_{len(broken)}")
        final = subprocess.run(command(broken[-1], config.steps), capture_output=True)
        expected = shipped(whole)
        results = {
            "kills": len(moments),
            "uninterrupted_seconds": seconds,
            "moments": moments,
            "jobs": len(broken),
            "finished": final.returncode == 0,
            "artefacts": len(expected),
            "bit_identical": all(is_same(shipped(f), expected) for f in broken),
            "metrics_equal": all(metrics(f) == metrics(whole) for f in broken),
        }
    measure.write(results, config.out)
    if not all(results[key] for key in ("finished", "bit_identical", "metrics_equal")):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
