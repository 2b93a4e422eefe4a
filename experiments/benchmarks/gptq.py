"""GPTQ of one layer: over a NumPy reference of the paper, and over llm-compressor.

Run: python -m experiments.benchmarks.gptq --out gptq.json

All take the same weights and Gram matrix, in float32, in turn, from there to the
quantized weights; jopt as users call it, from the inputs on, without and with the error
of the results. Scales are those of the whole range of a group, as the paper's code has
them, and, as jopt has them by default, of the share of it with the least squared error;
the reference does both. Inputs are small integers, so X^T X is exact whoever adds it
up. What is right is told by the reference in float64. llm-compressor takes part where
it is installed (it needs torch); its scales are float32, of the whole range, and those
of the weights before anything is rounded. Both have 16 levels in int4: jopt's largest
magnitude of a group gets -8, llm-compressor's 7.5 levels. Errors are compared as jopt's
come by default, and with float32 scales; on 15 levels (narrow_range=True) and with zero
points too.
"""

import argparse
import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.linalg

import jopt
from experiments.benchmarks import measure, one_shot

GROUP, BLOCK, DAMPING = 128, 128, 0.01
# How jopt finds scales, and the shares of the range that the reference tries for it.
FITS = {
    "default": ({}, np.linspace(1.0, 0.45, 12, dtype=np.float32)),
    "by_range": ({"fit": jopt.scale_fits.by_range}, np.ones(1, np.float32)),
}


def round_to(rows, scale, bits):
    """Return the codes of some rows."""
    half = 2 ** (bits - 1)
    return np.clip(np.rint(rows / scale), -half, half - 1)


def scale_of(rows, bits, shares):
    """Return the scales of the outputs of some rows, of either sign, as bfloat16."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    least, best = np.inf, np.ones((), rows.dtype)
    for share in shares:
        scale = -largest.astype(np.float32) * share / np.float32(2 ** (bits - 1))
        scale = scale.astype(ml_dtypes.bfloat16).astype(rows.dtype)
        if len(shares) == 1:
            return scale
        lost = np.square(rows - round_to(rows, scale, bits) * scale).sum(0)
        best = np.where(lost < least, scale, best)
        least = np.minimum(lost, least)
    return best


def reference(weights, gram, bits, dtype=np.float32, *, shares):
    """The algorithm of arXiv:2210.17323, with weights as [inputs, outputs]."""
    w, h = weights.astype(dtype), gram.astype(dtype)
    size, outputs = w.shape
    diagonal = np.arange(size)
    h[diagonal, diagonal] += DAMPING * np.mean(np.diag(h))
    lower = scipy.linalg.cholesky(h, lower=True)
    inverse = scipy.linalg.cho_solve((lower, True), np.eye(size, dtype=dtype))
    upper = scipy.linalg.cholesky(inverse, lower=False)
    codes = np.zeros(w.shape, np.int8)
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        block, errors = w[begin:end].copy(), np.zeros((end - begin, outputs), dtype)
        r = upper[begin:end, begin:end]
        for i in range(end - begin):
            if (begin + i) % GROUP == 0:
                scale = scale_of(block[i : i + GROUP], bits, shares)
            code = round_to(block[i], scale, bits)
            codes[begin + i] = code
            error = (block[i] - code * scale) / r[i, i]
            block[i] = code * scale
            block[i + 1 :] -= np.outer(r[i, i + 1 :], error)
            errors[i] = error
        w[begin:end] = block
        w[end:] -= upper[begin:end, end:].T @ errors
    return w, codes


def peer(weights, gram, bits, *, symmetric=True):
    """Quantize by llm-compressor, and return a function that does it again."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=GROUP, symmetric=symmetric
    )
    w = torch.from_numpy(np.ascontiguousarray(weights.T))
    h = torch.from_numpy(gram)
    groups = w.reshape(w.shape[0], -1, GROUP)

    def run():
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        with torch.no_grad():
            found, _, fell_back = quantize_weight(
                w[None].clone(), h[None].clone(), scale[None], zero_point[None], None,
                args, blocksize=BLOCK, percdamp=DAMPING,
            )  # fmt: skip
        assert not bool(fell_back.any())
        return found[0].numpy().T

    return run


def lost(weights, found, gram):
    """Return ||X (W - Q)||^2 / ||X W||^2."""
    w, g = weights.astype(np.float64), gram.astype(np.float64)
    d = w - np.asarray(found, np.float64)
    return float(np.sum(d * (g @ d)) / np.sum(w * (g @ w)))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    weights, batches = one_shot.make(args.size)
    x = np.concatenate(batches)
    gram, params = x.T @ x, {"kernel": jnp.asarray(weights)}
    has_peer = importlib.util.find_spec("llmcompressor") is not None
    rows: dict[str, Any] = {}
    for bits in args.bits:
        spec = jopt.QuantSpec(getattr(jopt.formats, f"int{bits}"), group_size=GROUP)

        def ours(spec=spec, **options):
            packed, report = jopt.gptq(
                one_shot.apply, params, batches, spec, progress=False, **options
            )
            jax.block_until_ready(packed)
            return packed["kernel"], report

        def with_error(run):
            w, codes = run()
            left, whole = np.square(x @ (weights - w)), np.square(x @ weights)
            return codes, left.sum() / whole.sum()

        first = one_shot.first_call(lambda ours=ours: ours(errors=False)[0].codes)
        runs: dict[str, Any] = {}
        for name, (way, shares) in FITS.items():
            ref = functools.partial(
                lambda b, shares: reference(weights, x.T @ x, b, shares=shares),
                bits,
                shares,
            )
            go = functools.partial(ours, **way)
            runs[f"jopt {name}"] = lambda go=go: go(errors=False)[0].codes
            runs[f"numpy {name}"] = lambda ref=ref: ref()[1]
            if name == "default":
                runs["jopt with errors"] = lambda go=go: go()[0].codes
                runs["numpy with errors"] = lambda ref=ref: with_error(ref)[0]
        if has_peer:
            theirs = peer(weights, gram, bits)
            runs["llm-compressor"] = lambda theirs=theirs: (x.T @ x, theirs())
        seconds = measure.alternate(runs, rounds=args.rounds, warmup=1)
        simple = jopt.rtn(
            one_shot.apply, params, batches, spec, errors=False, progress=False
        )[0]["kernel"].to_array()
        row = {
            "seconds": seconds,
            "first_call_seconds": first,
            "faster_with_errors": seconds["numpy with errors"]
            / seconds["jopt with errors"],
            "error_of_rounding": lost(weights, simple, gram),
        }
        for name, (way, shares) in FITS.items():
            right, codes = reference(weights, gram, bits, np.float64, shares=shares)
            near = reference(weights, gram, bits, shares=shares)[1]
            packed, report = ours(**way)
            differ = np.asarray(codes_of(packed)) != codes
            row[name] = {
                "faster": seconds[f"numpy {name}"] / seconds[f"jopt {name}"],
                "codes_that_differ": int(differ.sum()),
                "of": int(differ.size),
                "outputs_with_the_same_codes": int((~differ.any(axis=0)).sum()),
                "numpy_float32_codes_that_differ": int((near != codes).sum()),
                "error": lost(weights, jopt.dequantize(packed), gram),
                "error_in_the_report": report["kernel"].error,
                "error_of_float64": lost(weights, right, gram),
            }
            if has_peer:
                row[name]["over_llm_compressor"] = (
                    seconds["llm-compressor"] / seconds[f"jopt {name}"]
                )
        if has_peer:
            row["error_of_llm_compressor"] = lost(weights, theirs(), gram)
            row["error_over_llm_compressor"] = (
                row["default"]["error"] / row["error_of_llm_compressor"]
            )
            wide = dataclasses.replace(spec, scale_dtype=jnp.float32)
            grids = {
                "symmetric": wide,
                "narrow range": dataclasses.replace(wide, narrow_range=True),
                "asymmetric": dataclasses.replace(wide, symmetric=False),
            }
            by_range = FITS["by_range"][0]
            ways = {
                "jopt": {},
                "jopt by range": by_range,
                "jopt by range with static groups": by_range | {"static_groups": True},
                "jopt by range in activation order": by_range
                | {"activation_order": True},
            }
            for grid, other in grids.items():
                theirs = peer(weights, gram, bits, symmetric=other.symmetric)
                row[grid] = {"llm-compressor": lost(weights, theirs(), gram)}
                for name, way in ways.items():
                    found = ours(other, **way)[0].to_array()
                    row[grid][name] = lost(weights, found, gram)
        rows[spec.format.name] = row
        print(spec, row, flush=True)
    measure.write({"size": args.size, "group": GROUP, "rows": rows}, args.out)


def codes_of(packed):
    """Return the codes one by one."""
    scale = np.repeat(np.asarray(packed.scale, np.float32), GROUP, axis=0)
    return np.rint(np.asarray(packed.to_array()) / scale)


if __name__ == "__main__":
    main()
