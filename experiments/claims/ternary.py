"""Ternary from scratch beside float: a GPT on tiny Shakespeare at equal steps.

    python -m experiments.claims.ternary --data-dir FOLDER

BitNet b1.58 (arXiv:2402.17764) in two calls: `jopt.quantize_weights` keeps every matrix
of the layers on {-g, 0, g}, g the mean magnitude of the whole matrix, and
`jopt.fake_quantize` rounds what meets them to eight bits per token. Embeddings, norms
and the head stay float, as there. Start, batches, optimizer and number of steps are
those of the float model. What is evaluated is what ships: packed codes of two bits,
read back and run by `jopt.execute`.

The claim: the loss on held-out text is within 5 % of that of the float model.

Started again, the job skips what is finished and trains on from the last checkpoint.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jopt
from experiments import compress, models, plots, records, train
from experiments import data as datasets
from experiments.benchmarks import measure
from experiments.variants import adamw

NAME = "ternary"
LAYERS = r"layers/.*/kernel"
TERNARY = {LAYERS: jopt.QuantSpec(jopt.formats.ternary, axis=())}
INT8 = jopt.QuantSpec(jopt.formats.int8)  # one scale per token
METHODS = {
    "float": "float",
    "ternary_weights": "ternary weights",
    "ternary": "ternary weights, int8 inputs",
}
COLORS = {"float": "#222222", "ternary_weights": "#67a9cf", "ternary": "#d73027"}
LIMIT = 0.05


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; the defaults take about half an hour on one core."""

    out: Path = Path("runs/ternary")
    """Where everything goes; started again with the same options it continues."""
    data_dir: Path | None = None
    """A text, or a folder with one."""
    steps: int = 1500
    width: int = 128
    depth: int = 4
    length: int = 64
    """Characters that the model sees at once."""
    batch_size: int = 16
    learning_rate: float = 3e-3
    test_windows: int = 2000
    """At most so many, side by side; more than the held-out text has is all of it."""
    save_every: int = 100
    summarize: bool = False
    """Train nothing: only make the result, the table and the picture."""


class Job:
    """One text, one start, and the models that are trained from it."""

    def __init__(self, config: Config):
        self.config = config
        data = datasets.load(config.data_dir, length=config.length)
        if data.kind != "text":
            raise ValueError(f"data_dir must hold a text, got the images {data.name!r}")
        self.data = data
        size = models.ModelConfig("gpt", depth=config.depth, width=config.width)
        self.apply, self.first = models.build(size, data, seed=0)
        self.test = datasets.test_batch(data, most=config.test_windows)

    def train(self, method: str) -> dict[str, Any]:
        """Train one model, pack it, read it back, and evaluate that."""
        config, folder = self.config, self.config.out / "runs" / method
        start = time.perf_counter()

        def tell(step: int) -> None:
            seconds = time.perf_counter() - start
            records.say(f"  step {step} of {config.steps}, {seconds:.0f} s")

        apply, tx = self.apply, adamw(config.steps, config.learning_rate)
        activations = {LAYERS: INT8} if method == "ternary" else None
        if method != "float":
            tx = jopt.quantize_weights(tx, TERNARY)
        if activations is not None:
            apply = jopt.fake_quantize(apply, None, activations=activations)
        result = train.fit(
            train.make_trainer(compress.make_loss(apply, None), tx),
            tx,
            self.first,
            lambda step: datasets.batch_at(
                self.data, seed=0, step=step, size=config.batch_size
            ),
            train.TrainConfig(
                config.steps,
                config.batch_size,
                log_every=max(config.steps // 60, 1),
                save_every=config.save_every,
            ),
            directory=folder,
            on_step=tell,
        )
        params = result.params
        if method != "float":
            scales = jopt.get_scales(result.state)
            params = jopt.quantize(params, TERNARY, scales=scales)
        jopt.save(folder / "artefact", {"params": params}, step=config.steps)
        params = jopt.restore(folder / "artefact")["params"]
        if method != "float":
            apply = jopt.execute(self.apply, activations=activations)
        measured = compress.evaluate(compress.make_predict(apply), params, self.test)
        dense = jopt.dequantize(params)
        return {
            "method": method,
            "loss": measured["loss"],
            "bits_per_character": measured["bits_per_character"],
            "num_params": models.num_params(dense),
            "layer_bytes": sum(leaf.nbytes for leaf in kernels_of(params)),
            "zeros": float(np.mean(np.concatenate([
                np.asarray(leaf).ravel() == 0 for leaf in kernels_of(dense)
            ]))),
            "levels": max(len(np.unique(leaf)) for leaf in kernels_of(dense)),
            "test_characters": int(self.test["y"].size),
            "seconds": result.seconds,
            "hardware": measure.hardware(),
        }  # fmt: skip


def kernels_of(params: Any) -> list[Any]:
    """List the matrices of the layers, packed ones as they are."""
    select = jopt.matching(LAYERS)
    leaves = jax.tree.leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, jopt.QuantizedArray)
    )
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
    ]
    return [leaf for path, leaf in named if select(path, leaf)]


def record_of(out: Path, method: str) -> Path:
    """Return where a result lies."""
    return out / "runs" / method / "result.json"


def over_float(results: list[dict[str, Any]], result: dict[str, Any]) -> float:
    """Return how much higher the loss is than that of the float model."""
    return float(result["loss"] / results[0]["loss"] - 1)


def make_table(results: list[dict[str, Any]]) -> str:
    """One line per model."""
    rows = []
    for result in results:
        is_float = result["method"] == "float"
        rows.append(
            [
                METHODS[result["method"]],
                f"{result['loss']:.4f}",
                "-" if is_float else f"{100 * over_float(results, result):+.1f} %",
                f"{result['bits_per_character']:.3f}",
                f"{result['layer_bytes'] / 1000:.0f}",
                f"{100 * result['zeros']:.1f} %",
                f"{result['seconds']:.0f}",
            ]
        )
    heads = ["model", "nats", "over float", "bits/char", "kB of layers", "zeros", "s"]
    return records.markdown(heads, rows)


def draw(out: Path, results: list[dict[str, Any]]) -> Any:
    """Draw the training loss by step, and the loss on held-out text at the end."""
    plt = plots.plt
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for result in results:
        method = result["method"]
        rows = train.read_metrics(out / "runs" / method / "metrics.jsonl")
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        axis.plot(steps, losses, color=COLORS[method], label=METHODS[method], alpha=0.8)
        axis.plot(
            [steps[-1]], [result["loss"]], "D", markersize=8, color=COLORS[method]
        )
    limit = (1 + LIMIT) * results[0]["loss"]
    axis.axhline(limit, color="#999999", linestyle=":", label="5 % over float")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("step")
    axis.set_ylabel("nats; diamonds: held-out text")
    axis.legend(frameon=False)
    plots.clean(axis, "Ternary from scratch")
    return figure


def summarize(config: Config) -> str:
    """Write the result, the table and the picture of what is finished."""
    files = [record_of(config.out, method) for method in METHODS]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results or results[0]["method"] != "float":
        raise ValueError(
            f"out must hold a finished float model, got {str(config.out)!r}"
        )
    table = make_table(results)
    summary = {
        "claim": "a ternary GPT trained from scratch within 5 % of float",
        "hardware": results[0]["hardware"],
        "settings": json.loads((config.out / "settings.json").read_text()),
        "seeds": 1,
        "results": results,
        "over_float": {r["method"]: over_float(results, r) for r in results[1:]},
        "is_within_5_percent": {
            r["method"]: over_float(results, r) <= LIMIT for r in results[1:]
        },
    }
    records.write_json(config.out / f"{NAME}.json", summary)
    records.write_atomically(config.out / f"{NAME}.md", table + "\n")
    figure = draw(config.out, results)
    figure.savefig(config.out / f"{NAME}.png", dpi=110)
    plots.plt.close(figure)
    return table


def main(config: Config) -> None:
    """Train what is not finished, then show everything."""
    if not config.summarize:
        settings = dataclasses.asdict(config)
        for key in ("out", "data_dir", "save_every", "summarize"):
            del settings[key]
        settings["data"] = config.data_dir and config.data_dir.name
        records.claim_folder(config.out, settings)
        job = Job(config)
        for method in METHODS:
            record = record_of(config.out, method)
            if not record.exists():
                records.say(METHODS[method])
                result = job.train(method)
                records.write_json(record, result)
                records.say(f"  {result['bits_per_character']:.3f} bits per character")
    print(summarize(config))


if __name__ == "__main__":
    records.run(main, Config, __doc__)
