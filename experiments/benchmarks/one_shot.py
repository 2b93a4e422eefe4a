"""One-shot pruning of one layer: over a NumPy reference of the papers' equations.

Run: python -m experiments.benchmarks.one_shot --out one_shot.json

Both take the same weights and inputs, in float32, in turn, from the inputs to the
pruned weights, and to what is lost of the results where it says `with errors`. Inputs
are small integers, so X^T X is exact whoever adds it up. What is right is told by the
reference in float64. Peak memory is the resident size of a fresh process, with errors,
on its first call, which compiles, and on its second; and where glibc is told to give
back whatever is freed, since by default it keeps pieces of up to 32 MB, some for each
thread, which at this size are a good part of a weight-sized array.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import jopt
from experiments.benchmarks import measure

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
    """Draw weights, and batches of correlated inputs, integers of at most 8."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)).astype(np.float32) / np.sqrt(size)
    x = rng.normal(size=(2 * size, size)).astype(np.float32) @ mixing
    x = np.clip(np.rint(2 * x), -8, 8)
    return rng.normal(size=(size, size)).astype(np.float32), np.split(x, 8)


def apply(params, x):
    """One layer."""
    return x @ params["kernel"]


def prune(method, weights, batches, group, *, errors=True):
    """Prune by jopt, as a user would."""
    how = {"sparsity": SPARSITY} if group is None else {"pattern": jopt.NM(*group)}
    found = getattr(jopt, method)(
        apply, {"kernel": weights}, batches, errors=errors, progress=False, **how
    )
    return jax.block_until_ready((found[0]["kernel"], found[1]["kernel"]))


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
    record = {}
    for name, more in (
        ("as it is", {}),
        ("freed memory given back", {"MALLOC_MMAP_THRESHOLD_": "1000000"}),
    ):
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | more
        ).stdout
        record[name] = json.loads(out.splitlines()[-1])
    return record


def report_peak(method, size, group):
    """Print the largest resident size, weights included and the batches not."""
    small = np.ones((64, 64), np.float32)
    prune(method, jnp.asarray(small), [small], group)  # libraries are there
    batches = make(size)[1]
    weights = jax.random.normal(jax.random.key(0), (size, size))
    jax.block_until_ready(weights)
    unit = size * size * 4 / 1024
    record = {}
    for call in ("first", "second"):
        settle()
        start = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak from here on
        prune(method, weights, batches, group)
        record[call] = 1 + (resident("VmHWM") - start) / unit
    print(json.dumps(record))


def settle():
    """Give back what is no longer used, and what compiling left to the allocator."""
    gc.collect()
    time.sleep(1)
    ctypes.CDLL("libc.so.6").malloc_trim(0)


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
    weights, batches = make(args.size)
    w, x = jnp.asarray(weights), np.concatenate(batches)
    rows = {}
    for group in (None, (2, 4)):
        for method in ("sparsegpt", "wanda"):
            name = f"{method} {'50 %' if group is None else '2:4'}"

            def ours(method=method, group=group):
                return prune(method, w, batches, group, errors=False)

            def ours_with_errors(method=method, group=group):
                return prune(method, w, batches, group)

            def theirs(dtype=np.float32, method=method, group=group):
                if method == "wanda":
                    squares = np.square(x, dtype=dtype).sum(0, dtype=dtype)
                    return reference_wanda(weights.astype(dtype), squares, group)
                return reference_sparsegpt(weights, x.T @ x, group, dtype)

            def theirs_with_errors(theirs=theirs):
                pruned, mask = theirs()
                lost, whole = np.square(x @ (weights - pruned)), np.square(x @ weights)
                return pruned, mask, lost.sum() / whole.sum()

            first = first_call(ours)
            seconds = measure.alternate(
                {
                    "jopt": ours,
                    "numpy": theirs,
                    "jopt with errors": ours_with_errors,
                    "numpy with errors": theirs_with_errors,
                },
                rounds=args.rounds,
                warmup=0,
            )
            right = theirs(np.float64)
            rows[name] = {
                "seconds": seconds,
                "faster": seconds["numpy"] / seconds["jopt"],
                "faster_with_errors": seconds["numpy with errors"]
                / seconds["jopt with errors"],
                "first_call_seconds": first,
                "jopt_against_float64": compare(ours(), right),
                "numpy_float32_against_float64": compare(theirs(), right),
                "peak_in_weight_sized_arrays": peak_of(method, args.size, group),
            }
            print(name, json.dumps(rows[name]), flush=True)
    product = measure.alternate({"product": lambda: w @ w}, rounds=args.rounds)
    record = {
        "size": args.size,
        "rows": rows,
        "one_product_of_this_size_seconds": product["product"],
        # Gram matrix, its factor and that one's inverse, pruning, norms of the errors.
        "products_that_sparsegpt_takes": 2 + 1 / 6 + 1 / 6 + 1 / 2 + 2 / 2,
    }
    measure.write(record, args.out)


if __name__ == "__main__":
    main()
