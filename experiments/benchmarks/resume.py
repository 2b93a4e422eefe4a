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


def main(config: Config) -> None:
    """Run, kill, run to the end, compare."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        start = time.perf_counter()
        subprocess.run(command(whole, config.steps), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        moments = []
        for _ in range(config.kills):
            process = subprocess.Popen(
                command(broken, config.steps),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Anywhere from before the first import to well into a variant or two.
            moments.append(rng.uniform(0.0, max(0.35 * seconds, 5.0)))
            try:
                process.wait(timeout=moments[-1])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        final = subprocess.run(command(broken, config.steps), capture_output=True)
        expected, actual = shipped(whole), shipped(broken)
        results = {
            "kills": config.kills,
            "uninterrupted_seconds": seconds,
            "moments": moments,
            "finished": final.returncode == 0,
            "artefacts": len(expected),
            "bit_identical": is_same(actual, expected),
            "metrics_equal": all(
                (whole / file).read_text() == (broken / file).read_text()
                for file in sorted(
                    str(f.relative_to(whole)) for f in whole.rglob("metrics.jsonl")
                )
            ),
        }
    measure.write(results, config.out)
    if not (results["finished"] and results["bit_identical"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
