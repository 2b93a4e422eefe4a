"""Post-training quantization side by side: a GPT on tiny Shakespeare, at 8 to 2 bits.

    python -m experiments.claims.post_training --data-dir FOLDER

The dense GPT of `experiments.claims.one_shot` is trained once (or taken from that
claim's folder by `--dense`). Then these quantize every matrix of its layers, not the
embeddings and the head, from windows of the training text:

    rtn             rounding to nearest
    hqq             the same, with scales of half-quadratic fits: no text is needed
    awq             arXiv:2306.00978
    autoround       arXiv:2309.05516
    gptq_by_range   arXiv:2210.17323, with scales that reach the largest weights
    gptq            the same with the scales of least squared error
    gptq_ordered    the same, inputs with the most activation first
    gptq_corrected  GPTQ, and layers corrected for those before (QEP, arXiv:2504.09629)

Scales are bfloat16 and have zero points beside them, or, with `--symmetric`, either
sign. Then the weights stay floats, and
attention reads keys and values from caches of few bits, a scale per token and head.
What is evaluated is what would ship: the packed params, executed on the held-out text;
bits are those of codes, scales and zero points over the weights.

Started again, the job skips what is finished and trains on from the last checkpoint.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from matplotlib import ticker

import jopt
from experiments import compress, generate, models, plots, records
from experiments.benchmarks import measure
from experiments.claims import one_shot

NAME = "post_training"


@dataclasses.dataclass(frozen=True)
class Config(one_shot.Config):
    """Options; those of training are those of the one-shot claim."""

    out: Path = Path("runs/post_training")
    """Where everything goes; started again with the same options it continues."""
    dense: Path | None = None
    """The folder of a finished one-shot claim, whose dense model is taken."""
    calibration_batches: int = 32
    """More than pruning needs: what is rounded last rests on small differences."""
    methods: tuple[str, ...] = (
        "rtn", "hqq", "awq", "autoround", "gptq_by_range", "gptq", "gptq_ordered",
        "gptq_corrected",
    )  # fmt: skip
    bits: tuple[int, ...] = (8, 4, 3, 2)
    groups: tuple[int, ...] = (32, 128)
    symmetric: bool = False
    """Signed integers without zero points, as `jopt.QuantSpec` has them by default."""
    caches: tuple[str, ...] = ("int8", "fp8_e4m3", "int4")


Quantizer = Callable[["one_shot.Job", jopt.QuantSpec], Any]


def calibrated(method: Callable[..., Any], **options: Any) -> Quantizer:
    """Quantize by a method that takes batches."""

    def go(job: one_shot.Job, spec: jopt.QuantSpec) -> Any:
        return method(
            job.apply,
            job.params,
            job.calibration,
            spec,
            select=one_shot.PRUNED,
            progress=False,
            **options,
        )[0]

    return go


def without_data(job: one_shot.Job, spec: jopt.QuantSpec) -> Any:
    """Quantize by HQQ."""
    return jopt.hqq(job.params, spec, select=one_shot.PRUNED)


METHODS: dict[str, tuple[str, Quantizer]] = {
    "rtn": ("to nearest", calibrated(jopt.rtn, errors=False)),
    "hqq": ("HQQ", without_data),
    "awq": ("AWQ", calibrated(jopt.awq)),
    "autoround": ("AutoRound", calibrated(jopt.autoround)),
    "gptq_by_range": (
        "GPTQ by range",
        calibrated(jopt.gptq, fit=jopt.scale_fits.by_range),
    ),
    "gptq": ("GPTQ", calibrated(jopt.gptq)),
    "gptq_ordered": ("ordered GPTQ", calibrated(jopt.gptq, activation_order=True)),
    "gptq_corrected": ("GPTQ, QEP", calibrated(jopt.gptq, correction=1.0)),
}


def spec_of(bits: int, group: int, symmetric: bool) -> jopt.QuantSpec:
    """Return integers with a scale per group, and a zero point or none."""
    if symmetric:
        return jopt.QuantSpec(getattr(jopt.formats, f"int{bits}"), group_size=group)
    return jopt.QuantSpec(
        getattr(jopt.formats, f"uint{bits}"), group_size=group, symmetric=False
    )


def work(config: Config) -> list[tuple[str, int, int]]:
    """List (method, bits, group), the dense model first."""
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {list(METHODS)}, got {unknown}")
    rows = [
        (m, b, g) for b in config.bits for g in config.groups for m in config.methods
    ]
    return [("dense", 32, 0), *rows]


def record_of(out: Path, method: str, bits: int, group: int) -> Path:
    """Return where a result lies."""
    return out / "runs" / f"{method}_{bits}_{group}" / "result.json"


def cache_record_of(out: Path, name: str) -> Path:
    """Return where the result of a cache lies."""
    return out / "runs" / f"cache_{name}" / "result.json"


def run(
    job: one_shot.Job, method: str, bits: int, group: int, *, symmetric: bool
) -> dict[str, Any]:
    """Quantize by one method and evaluate."""
    packed, start = job.params, time.perf_counter()
    apply, weight_bits = job.apply, 32.0
    if method != "dense":
        packed = METHODS[method][1](job, spec_of(bits, group, symmetric))
        jax.block_until_ready(packed)
        apply = jopt.execute(job.apply)
        chosen = [
            leaf
            for leaf in jax.tree.leaves(packed, is_leaf=is_packed)
            if is_packed(leaf)
        ]
        stored = sum(8 * leaf.nbytes for leaf in chosen)
        weight_bits = stored / sum(leaf.size for leaf in chosen)
    seconds = time.perf_counter() - start
    measured = compress.evaluate(compress.make_predict(apply), packed, job.test)
    return {
        "method": method,
        "bits": bits,
        "group": group,
        "bits_per_weight": weight_bits,
        "loss": measured["loss"],
        "bits_per_character": measured["bits_per_character"],
        "seconds": seconds,
        "test_characters": int(job.test["y"].size),
        "hardware": measure.hardware(),
    }


def run_cache(job: one_shot.Job, name: str) -> dict[str, Any]:
    """Evaluate with a cache of few bits, which holds a window when it is read.

    Scales are those of a token and a head, so this is what one character after the
    other would read.
    """
    size = models.ModelConfig("gpt", depth=job.config.depth, width=job.config.width)
    specs = generate.CACHES[name]

    def apply(params: Any, x: Any) -> Any:
        return job.apply(params, x, generate.make_caches(size, x.shape, *specs))[0]

    measured = compress.evaluate(compress.make_predict(apply), job.params, job.test)
    cache, plain = (
        generate.make_caches(size, (1, job.config.length), *pair)[0]
        for pair in (specs, (None, None))
    )
    return {
        "cache": name,
        "loss": measured["loss"],
        "bits_per_character": measured["bits_per_character"],
        "bytes_over_float": cache.nbytes / plain.nbytes,
        "hardware": measure.hardware(),
    }


def is_packed(leaf: Any) -> bool:
    """Tell quantized leaves."""
    return isinstance(leaf, jopt.QuantizedArray)


def make_table(results: list[dict[str, Any]]) -> str:
    """One line per width and group, a column per method."""
    dense = results[0]
    methods = [m for m in METHODS if any(r["method"] == m for r in results)]
    found = {(r["method"], r["bits"], r["group"]): r for r in results}
    rows = [["float", "32", *[f"{dense['loss']:.4f}"] * len(methods)]]
    for bits, group in dict.fromkeys((r["bits"], r["group"]) for r in results[1:]):
        mine = [found.get((m, bits, group)) for m in methods]
        stored = next(r["bits_per_weight"] for r in mine if r is not None)
        cells = [
            "-"
            if r is None
            else f"{r['loss']:.4f} ({100 * (r['loss'] / dense['loss'] - 1):+.2f} %)"
            for r in mine
        ]
        label = f"{bits} bits, groups of {group}"
        rows.append([label, f"{stored:.2f}", *cells])
    labels = [METHODS[m][0] for m in methods]
    return records.markdown(["held-out nats", "bits/weight", *labels], rows)


def make_cache_table(dense: float, caches: list[dict[str, Any]]) -> str:
    """One line per cache."""
    rows = [["float32", f"{dense:.4f}", "-", "1"]]
    for r in caches:
        over = f"{100 * (r['loss'] / dense - 1):+.2f} %"
        bytes_ = f"{r['bytes_over_float']:.3f}"
        rows.append([r["cache"], f"{r['loss']:.4f}", over, bytes_])
    return records.markdown(["cache", "held-out nats", "over float", "bytes"], rows)


def draw(results: list[dict[str, Any]]) -> Any:
    """Draw what is lost over the bits of a weight, a line per method."""
    plt = plots.plt
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    dense = results[0]["loss"]
    colors = [
        "#999999",
        "#b35806",
        "#2166ac",
        "#762a83",
        "#1b7837",
        "#e08214",
        "#7fbf7b",
        "#c51b7d",
    ]
    for (name, (label, _)), color in zip(METHODS.items(), colors, strict=True):
        mine = sorted(
            (r for r in results if r["method"] == name),
            key=lambda r: r["bits_per_weight"],
        )
        # What is lost may be below zero where it is next to nothing.
        lost = [max(100 * (r["loss"] / dense - 1), 1e-3) for r in mine]
        axis.plot(
            [r["bits_per_weight"] for r in mine], lost, "o-", color=color, label=label
        )
    axis.axhline(0.5, color="#222222", linestyle=":", label="0.5 %")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=99))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("bits per weight, scales and zero points included")
    axis.set_ylabel("held-out loss over that of floats, %")
    figure.legend(frameon=False, loc="outside right upper")
    plots.clean(axis, "A GPT quantized after training")
    return figure


def summarize(config: Config) -> str:
    """Write the result, the table and the picture of what is finished."""
    files = [record_of(config.out, *item) for item in work(config)]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results or results[0]["method"] != "dense":
        raise ValueError(
            f"out must hold a finished dense model, got {str(config.out)!r}"
        )
    files = [cache_record_of(config.out, name) for name in config.caches]
    caches = [json.loads(file.read_text()) for file in files if file.exists()]
    table = make_table(results)
    if caches:
        table += "\n\n" + make_cache_table(results[0]["loss"], caches)
    loss = {(r["method"], r["bits"], r["group"]): r["loss"] for r in results}
    summary = {
        "claim": "post-training quantization side by side",
        "hardware": results[0]["hardware"],
        "settings": json.loads((config.out / "settings.json").read_text()),
        "seeds": 1,
        "results": results,
        "caches": caches,
        "gptq_at_4_bits_over_float": {
            str(group): loss["gptq", 4, group] / results[0]["loss"] - 1
            for group in config.groups
            if ("gptq", 4, group) in loss
        },
    }
    records.write_json(config.out / f"{NAME}.json", summary)
    records.write_atomically(config.out / f"{NAME}.md", table + "\n")
    figure = draw(results)
    figure.savefig(config.out / f"{NAME}.png", dpi=110)
    plots.plt.close(figure)
    return table


def main(config: Config) -> None:
    """Train and quantize what is not finished, then show everything."""
    if not config.summarize:
        settings = dataclasses.asdict(config)
        for key in ("out", "dense", "data_dir", "save_every", "summarize"):
            del settings[key]
        for key in ("methods", "bits", "groups", "caches"):  # may grow
            del settings[key]
        settings["data"] = config.data_dir and config.data_dir.name
        records.claim_folder(config.out, settings)
        job = one_shot.Job(config)
        if config.dense is not None:
            job.params = jopt.restore(config.dense / "dense")["params"]
        else:
            job.train()
        for item in work(config):
            record = record_of(config.out, *item)
            if not record.exists():
                records.say("{} {} bits, groups of {}".format(*item))
                result = run(job, *item, symmetric=config.symmetric)
                records.write_json(record, result)
                records.say(f"  {result['loss']:.4f} nats")
        for name in config.caches:
            record = cache_record_of(config.out, name)
            if not record.exists():
                records.say(f"a cache of {name}")
                records.write_json(record, run_cache(job, name))
    print(summarize(config))


if __name__ == "__main__":
    records.run(main, Config, __doc__)
