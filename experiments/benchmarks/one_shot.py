"""One-shot pruning of one matrix: over a NumPy reference of the papers' equations.

Run: python -m experiments.benchmarks.one_shot --out one_shot.json

Both take the same weights and the same Gram matrix, in float32, in turn. What is right
is told by the reference in float64. Peak memory is that of a fresh process.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from experiments.benchmarks import measure
from jopt.arrays.patterns import NM, Unstructured
from jopt.pruning.sparsegpt import inverse_factor, prune_with_factor, sparsegpt_matrix
from jopt.pruning.wanda import wanda_matrix

SPARSITY, BLOCK, DAMPING = 0.5, 128, 0.01


def reference_sparsegpt(weights, gram, group, dtype=np.float32):
    """The algorithm of arXiv:2301.00774, with weights as [inputs, outputs]."""
    w, h = weights.astype(dtype), gram.astype(dtype)
    size, outputs = w.shape
    diagonal = np.arange(size)
    h[diagonal, diagonal] += DAMPING * np.mean(np.diag(h))
    lower = scipy.linalg.cholesky(h, lower=True)
    inverse = scipy.linalg.cho_solve((lower, True), np.eye(size, dtype=dtype))
    upper = scipy.linalg.cholesky(inverse, lower=False)
    mask = np.ones(w.shape, bool)
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        block, errors = w[begin:end].copy(), np.zeros((end - begin, outputs), dtype)
        r = upper[begin:end, begin:end]
        scale = np.diag(r)[:, None]
        if group is None:
            scores = (block / scale) ** 2
            pruned = round(SPARSITY * scores.size)
            lowest = np.argpartition(scores.ravel(), pruned)[:pruned]
            mask[begin:end].reshape(-1)[lowest] = False
        for i in range(end - begin):
            if group is not None and i % group[1] == 0:
                scores = (block[i : i + group[1]] / scale[i : i + group[1]]) ** 2
                order = np.argsort(-scores, axis=0, kind="stable")[group[0] :]
                np.put_along_axis(
                    mask[begin + i : begin + i + group[1]], order, False, 0
                )
            q = np.where(mask[begin + i], block[i], 0)
            error = (block[i] - q) / r[i, i]
            block[i:] -= np.outer(r[i, i:], error)
            errors[i] = error
        w[begin:end] = block
        w[end:] -= upper[begin:end, end:].T @ errors
    return np.where(mask, w, 0), mask


def reference_wanda(weights, squares, group):
    """The score of arXiv:2306.11695, ranked within each output."""
    scores = np.abs(weights) * np.sqrt(squares)[:, None]
    mask = np.zeros(weights.shape, bool)
    if group is None:
        kept = weights.shape[0] - round(SPARSITY * weights.shape[0])
        order = np.argsort(-scores, axis=0, kind="stable")[:kept]
        np.put_along_axis(mask, order, True, 0)
    else:
        n, m = group
        groups = scores.reshape(-1, m, weights.shape[1])
        order = np.argsort(-groups, axis=1, kind="stable")[:, :n]
        np.put_along_axis(mask.reshape(groups.shape), order, True, 1)
    return np.where(mask, weights, 0), mask


def make(size, seed=0):
    """Draw weights, and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)).astype(np.float32) / np.sqrt(size)
    x = rng.normal(size=(2 * size, size)).astype(np.float32) @ mixing
    return rng.normal(size=(size, size)).astype(np.float32), x.T @ x


def options(group):
    """Say what to prune in jopt's words."""
    if group is None:
        return {"sparsity": SPARSITY, "pattern": Unstructured()}
    return {"sparsity": None, "pattern": NM(*group)}


def compare(found, expected):
    """Compare weights and mask with what is right."""
    (w, mask), (right, right_mask) = found, expected
    w, mask = np.asarray(w, np.float64), np.asarray(mask)
    differ = mask != right_mask
    same = ~differ.any(axis=0)
    gap = np.abs(w - right)[:, same].max() if same.any() else np.nan
    return {
        "mask_differs": int(differ.sum()),
        "of": int(mask.size),
        "outputs_with_the_same_mask": int(same.sum()),
        "largest_difference_there": float(gap / np.abs(right).max()),
    }


def first_call(fn):
    """Time compiling and running."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def peak_of(method, size, group):
    """Measure the peak of a fresh process, in weight-sized arrays beyond its start."""
    command = [sys.executable, "-m", "experiments.benchmarks.one_shot"]
    command += ["--size", str(size), "--peak", method]
    command += ["--group", "none" if group is None else "2:4"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def report_peak(method, size, group):
    """Run one method once, and print the growth of the largest resident size."""
    small, gram = make(64)
    run_once(
        method, jnp.asarray(small), jnp.asarray(gram), group
    )  # libraries are there
    before = resident("VmRSS")
    key = jax.random.key(0)
    weights = jax.block_until_ready(jax.random.normal(key, (size, size)))
    if method == "wanda":
        moments = jnp.ones(size)
    else:
        # Made in one pass, so that nothing but it stays resident.
        decay = jax.jit(
            lambda: jnp.exp(
                -abs(jnp.arange(size)[:, None] - jnp.arange(size)[None, :]) / 8.0
            )
        )
        moments = jax.block_until_ready(decay())
    inputs = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak from here on
    run_once(method, weights, moments, group)
    unit = size * size * 4 / 1024
    record = {
        "inputs": (inputs - before) / unit,
        "peak": (resident("VmHWM") - before) / unit,
    }
    print(json.dumps(record))


def run_once(method, weights, moments, group):
    """Prune, and wait."""
    if method == "wanda":
        squares = jnp.diagonal(moments) if moments.ndim == 2 else moments
        result = wanda_matrix(weights, squares, **options(group))
    else:
        result = sparsegpt_matrix(weights, moments, **options(group))
    jax.block_until_ready(result)


def resident(field):
    """Read a resident size of this process, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(f"{field} must be in /proc/self/status")


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=["sparsegpt", "wanda"])
    parser.add_argument("--group", choices=["none", "2:4"], default="none")
    args = parser.parse_args()
    if args.peak:
        group = None if args.group == "none" else (2, 4)
        report_peak(args.peak, args.size, group)
        return
    weights, gram = make(args.size)
    squares = np.diag(gram).copy()
    w, g, s = map(jnp.asarray, (weights, gram, squares))
    rows = {}
    for group in (None, (2, 4)):
        name = "50 %" if group is None else "2:4"
        how = options(group)
        cases = {
            "sparsegpt": (
                lambda how=how: sparsegpt_matrix(w, g, **how),
                lambda group=group: reference_sparsegpt(weights, gram, group),
                lambda group=group: reference_sparsegpt(
                    weights, gram, group, np.float64
                ),
            ),
            "wanda": (
                lambda how=how: wanda_matrix(w, s, **how),
                lambda group=group: reference_wanda(weights, squares, group),
                lambda group=group: reference_wanda(weights, squares, group),
            ),
        }
        for method, (ours, theirs, truth) in cases.items():
            first = first_call(ours)
            seconds = measure.alternate(
                {"jopt": ours, "numpy": theirs}, rounds=args.rounds, warmup=0
            )
            right = truth()
            rows[f"{method} {name}"] = {
                "seconds": seconds,
                "faster": seconds["numpy"] / seconds["jopt"],
                "first_call_seconds": first,
                "jopt_against_float64": compare(ours(), right),
                "numpy_float32_against_float64": compare(theirs(), right),
                "peak_in_weight_sized_arrays": peak_of(method, args.size, group),
            }
            print(f"{method} {name}", json.dumps(rows[f"{method} {name}"]), flush=True)
    dead = jnp.zeros(args.size, bool)
    factor = inverse_factor(g, DAMPING)
    parts = measure.alternate(
        {
            "factor": lambda: inverse_factor(g, DAMPING),
            "prune": lambda: prune_with_factor(
                w, factor, dead=dead, block_size=BLOCK, **options(None)
            ),
            "one product of this size": lambda: w @ g,
        },
        rounds=args.rounds,
    )
    measure.write({"size": args.size, "rows": rows, "parts": parts}, args.out)


if __name__ == "__main__":
    main()
