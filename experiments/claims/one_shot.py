"""One-shot pruning side by side: a GPT on tiny Shakespeare, at 50 % and 2:4.

    python -m experiments.claims.one_shot --data-dir FOLDER

A dense GPT is trained once. Then magnitude (per layer and per output), Wanda
(arXiv:2306.11695) and SparseGPT (arXiv:2301.00774) prune every matrix of its layers,
not the embeddings and the head, without any training, from windows of the training
text; bits per character are those of the held-out text. For each layer the
reconstruction error

    ||X W - X W'||^2 / ||X W||^2

of SparseGPT stands beside that of magnitude, on the activations X that the layer meets
in the dense model: those it was calibrated on, and those of held-out text.

Started again, the job skips what is finished and trains on from the last checkpoint.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jopt
from experiments import compress, models, plots, records, train
from experiments import data as datasets
from experiments.benchmarks import measure
from experiments.variants import adamw

NAME = "one_shot"
PRUNED = jopt.matching(r"layers/.*/kernel")
SPARSITIES = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"pattern": jopt.NM(2, 4)},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; the defaults take a quarter of an hour on one core."""

    out: Path = Path("runs/one_shot")
    """Where everything goes; started again with the same options it continues."""
    data_dir: Path | None = None
    """A text, or a folder with one."""
    steps: int = 2000
    width: int = 128
    depth: int = 4
    length: int = 128
    """Characters that the model sees at once."""
    batch_size: int = 16
    learning_rate: float = 3e-3
    calibration_batches: int = 8
    calibration_seed: int = 1
    """Another draws other windows of the training text."""
    test_windows: int = 2000
    """At most so many, side by side; more than the held-out text has is all of it."""
    save_every: int = 200
    summarize: bool = False
    """Train and prune nothing: only make the result, the table and the picture."""


Pruner = Callable[["Job", dict[str, Any]], Any]


def by_magnitude(job: "Job", goal: dict[str, Any]) -> Any:
    """Keep the largest weights of each layer."""
    if "pattern" in goal:  # along the inputs, as the others
        goal = {"pattern": jopt.NM(2, 4, axis=-2)}
    masks = jopt.make_masks(job.params, select=PRUNED, **goal)
    return jopt.apply_masks(job.params, masks)


def by_magnitude_per_output(job: "Job", goal: dict[str, Any]) -> Any:
    """Keep the largest weights of each output."""
    stacks = {r"layers/.*/kernel": 1}  # an output stands for a layer of its own
    masks = jopt.make_masks(
        job.params,
        select=PRUNED,
        stacked_axes=stacks,
        pattern=jopt.Unstructured(),
        **goal,
    )
    return jopt.apply_masks(job.params, masks)


def by_wanda(job: "Job", goal: dict[str, Any]) -> Any:
    """Weights times the norms of their inputs."""
    return jopt.wanda(
        job.apply, job.params, job.calibration, select=PRUNED, progress=False, **goal
    )[0]


def by_sparsegpt(job: "Job", goal: dict[str, Any]) -> Any:
    """What stays makes up for what goes."""
    return jopt.sparsegpt(
        job.apply, job.params, job.calibration, select=PRUNED, progress=False, **goal
    )[0]


# N:M chooses within an output anyway, so magnitude has one row there.
METHODS: dict[str, tuple[str, Pruner, tuple[str, ...]]] = {
    "magnitude": ("magnitude", by_magnitude, ("50 %", "2:4")),
    "magnitude_per_output": (
        "magnitude per output",
        by_magnitude_per_output,
        ("50 %",),
    ),
    "wanda": ("Wanda", by_wanda, ("50 %", "2:4")),
    "sparsegpt": ("SparseGPT", by_sparsegpt, ("50 %", "2:4")),
}


class Job:
    """The dense model, and what is pruned from it."""

    def __init__(self, config: Config):
        self.config = config
        data = datasets.load(config.data_dir, length=config.length)
        if data.kind != "text":
            raise ValueError(f"data_dir must hold a text, got the images {data.name!r}")
        self.data = data
        size = models.ModelConfig("gpt", depth=config.depth, width=config.width)
        self.apply, self.first = models.build(size, data, seed=0)
        self.test = datasets.test_batch(data, most=config.test_windows)
        self.predict = compress.make_predict(self.apply)
        # Windows that training, with seed 0, has not drawn under the same number.
        seed, size = config.calibration_seed, config.batch_size
        self.calibration = [
            datasets.batch_at(data, seed=seed, step=i, size=size)["x"]
            for i in range(config.calibration_batches)
        ]

    def train(self) -> None:
        """Train the dense model, or take what was trained."""
        config, artefact = self.config, self.config.out / "dense"
        if not jopt.steps(artefact):
            start = time.perf_counter()

            def tell(step: int) -> None:
                seconds = time.perf_counter() - start
                records.say(f"  dense: step {step} of {config.steps}, {seconds:.0f} s")

            tx = adamw(config.steps, config.learning_rate)
            result = train.fit(
                train.make_trainer(compress.make_loss(self.apply, None), tx),
                tx,
                self.first,
                lambda step: datasets.batch_at(
                    self.data, seed=0, step=step, size=config.batch_size
                ),
                train.TrainConfig(
                    config.steps,
                    config.batch_size,
                    log_every=max(config.steps // 20, 1),
                    save_every=config.save_every,
                ),
                directory=config.out / "training",
                on_step=tell,
            )
            tree = {"params": result.params, "seconds": result.seconds}
            jopt.save(artefact, tree, step=config.steps)
        tree = jopt.restore(artefact)
        self.params, self.seconds = tree["params"], float(tree["seconds"])

    def evaluate(self, method: str, goal: str, params: Any) -> dict[str, Any]:
        """Measure params on the held-out text, and count their zeros."""
        measured = compress.evaluate(self.predict, params, self.test)
        kernels = [np.asarray(leaf) for leaf in kernels_of(params).values()]
        zeros = sum(int(np.sum(kernel == 0)) for kernel in kernels)
        return {
            "method": method,
            "goal": goal,
            "loss": measured["loss"],
            "bits_per_character": measured["bits_per_character"],
            "actual_sparsity": zeros / sum(kernel.size for kernel in kernels),
            "num_params": models.num_params(params),
            "test_characters": int(self.test["y"].size),
            "hardware": measure.hardware(),
        }

    def prune(self, method: str, goal: str) -> dict[str, Any]:
        """Prune by one method and evaluate."""
        if method == "dense":
            return self.evaluate(method, goal, self.params) | {"seconds": self.seconds}
        start = time.perf_counter()
        params = METHODS[method][1](self, SPARSITIES[goal])
        seconds = time.perf_counter() - start
        return self.evaluate(method, goal, params) | {"seconds": seconds}

    def compare_layers(self) -> list[dict[str, Any]]:
        """Measure each layer's reconstruction error at 50 %, the worst ratio first."""
        goal = SPARSITIES["50 %"]
        # Every layer for itself: all methods meet the activations of the dense model.
        alone, _, _ = jopt.sparsegpt(
            self.apply,
            self.params,
            self.calibration,
            select=PRUNED,
            error_propagation=False,
            progress=False,
            **goal,
        )
        candidates = {
            "magnitude": by_magnitude(self, goal),
            "magnitude_per_output": by_magnitude_per_output(self, goal),
            "sparsegpt": alone,
        }
        size = self.config.batch_size
        parts = [self.test["x"][i : i + size] for i in range(0, 8 * size, size)]
        texts = {"calibration": self.calibration, "held_out": parts}
        rows: dict[str, dict[str, Any]] = {}
        for text, batches in texts.items():
            batches = [part for part in batches if len(part)]
            grams = jopt.record(
                self.apply, self.params, batches, jopt.statistics.gram(), progress=False
            ).values
            for path, dense in kernels_of(self.params).items():
                row = rows.setdefault(path, {"layer": path})
                gram = np.asarray(grams[path]["gram"], np.float64)[0]
                for name, params in candidates.items():
                    kernel = kernels_of(params)[path]
                    row[f"{name}_{text}"] = reconstruction_error(gram, dense, kernel)
                best = min(
                    row[f"magnitude_{text}"], row[f"magnitude_per_output_{text}"]
                )
                row[f"ratio_{text}"] = row[f"sparsegpt_{text}"] / best
        return sorted(rows.values(), key=lambda row: -row["ratio_held_out"])


def kernels_of(params: Any) -> dict[str, Any]:
    """Return what is pruned, by path."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    return {path: leaf for path, leaf in leaves.items() if PRUNED(path, leaf)}


def reconstruction_error(gram: np.ndarray, dense: Any, sparse: Any) -> float:
    """tr(D^T G D) / tr(W^T G W) with D = W - W' and G = X^T X, in float64."""
    w = np.asarray(dense, np.float64)
    d = w - np.asarray(sparse, np.float64)
    return float(np.sum(d * (gram @ d)) / np.sum(w * (gram @ w)))


def work() -> list[tuple[str, str]]:
    """List (method, goal) in order."""
    pruned = [
        (m, goal) for goal in SPARSITIES for m in METHODS if goal in METHODS[m][2]
    ]
    return [("dense", "0 %"), *pruned]


def record_of(out: Path, method: str, goal: str) -> Path:
    """Return where a result lies."""
    name = goal.replace(":", "_").replace(" %", "")
    return out / "runs" / f"{method}_{name}" / "result.json"


def make_table(results: list[dict[str, Any]]) -> str:
    """One line per model."""
    dense = results[0]["bits_per_character"]
    rows = []
    for result in results:
        is_dense = result["method"] == "dense"
        rows.append(
            [
                "dense" if is_dense else METHODS[result["method"]][0],
                "-" if is_dense else result["goal"],
                f"{100 * result['actual_sparsity']:.2f} %",
                f"{result['bits_per_character']:.3f}",
                "-" if is_dense else f"+{result['bits_per_character'] - dense:.3f}",
                f"{result['loss']:.3f}",
                f"{result['seconds']:.1f}",
            ]
        )
    heads = ["method", "pattern", "zeros", "bits/char", "over dense", "nats", "seconds"]
    return records.markdown(heads, rows)


def make_layer_table(layers: list[dict[str, Any]]) -> str:
    """One line per layer, the worst ratio first."""
    heads = ["layer at 50 %", "magnitude", "per output", "SparseGPT", "ratio"]
    rows = []
    for row in layers:
        names = ("magnitude", "magnitude_per_output", "sparsegpt")
        cells = [f"{row[f'{name}_held_out']:.4f}" for name in names]
        rows.append([row["layer"], *cells, f"{row['ratio_held_out']:.2f}"])
    return records.markdown(heads, rows)


def draw(results: list[dict[str, Any]], layers: list[dict[str, Any]]) -> Any:
    """Draw bits per character by method, and the error of each layer."""
    plt = plots.plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colors = {"50 %": "#1b7837", "2:4": "#762a83"}
    for i, goal in enumerate(SPARSITIES):
        mine = [result for result in results if result["goal"] == goal]
        left.plot(
            [list(METHODS).index(r["method"]) + 0.1 * (2 * i - 1) for r in mine],
            [r["bits_per_character"] for r in mine],
            "os"[i],
            markersize=9,
            color=colors[goal],
            label=goal,
        )
    dense = results[0]["bits_per_character"]
    left.axhline(dense, color="#222222", linestyle="--", label="dense")
    left.set_xlim(-0.5, len(METHODS) - 0.5)
    labels = [label.replace(" ", "\n", 1) for label, _, _ in METHODS.values()]
    left.set_xticks(range(len(labels)), labels, fontsize=9)
    left.set_ylabel("bits per character, held-out text")
    left.legend(frameon=False)
    plots.clean(left, "Pruned in one shot, not trained after")
    ordered = sorted(layers, key=lambda row: row["layer"])
    places = range(len(ordered))
    for name, mark, color in (
        ("magnitude", "o", "#999999"),
        ("magnitude_per_output", "s", "#2166ac"),
        ("sparsegpt", "D", "#d73027"),
    ):
        heights = [row[f"{name}_held_out"] for row in ordered]
        label = METHODS[name][0]
        right.plot(places, heights, mark, color=color, label=label)
    names = [
        row["layer"].replace("layers/", "").removesuffix("/kernel") for row in ordered
    ]
    right.set_xticks(places, names, rotation=90, fontsize=8)
    right.set_yscale("log")
    right.set_ylabel("relative reconstruction error")
    right.legend(frameon=False)
    plots.clean(right, "Each layer at 50 %, held-out activations")
    return figure


def summarize(config: Config) -> str:
    """Write the result, the tables and the picture of what is finished."""
    files = [record_of(config.out, *item) for item in work()]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    layer_file = config.out / "layers.json"
    if not results or results[0]["method"] != "dense" or not layer_file.exists():
        raise ValueError(
            f"out must hold a finished dense model and layers, got {str(config.out)!r}"
        )
    layers = json.loads(layer_file.read_text())
    tables = make_table(results) + "\n\n" + make_layer_table(layers)
    summary = {
        "claim": "one-shot pruning side by side",
        "hardware": results[0]["hardware"],
        "settings": json.loads((config.out / "settings.json").read_text()),
        "seeds": 1,
        "results": results,
        "layers": layers,
        "sparsegpt_is_lower_on_every_layer": all(
            row[f"ratio_{text}"] < 1
            for row in layers
            for text in ("calibration", "held_out")
        ),
    }
    records.write_json(config.out / f"{NAME}.json", summary)
    records.write_atomically(config.out / f"{NAME}.md", tables + "\n")
    figure = draw(results, layers)
    figure.savefig(config.out / f"{NAME}.png", dpi=110)
    plots.plt.close(figure)
    return tables


def main(config: Config) -> None:
    """Train and prune what is not finished, then show everything."""
    if not config.summarize:
        settings = dataclasses.asdict(config)
        for key in ("out", "data_dir", "save_every", "summarize"):
            del settings[key]
        settings["data"] = config.data_dir and config.data_dir.name
        records.claim_folder(config.out, settings)
        job = Job(config)
        job.train()
        for method, goal in work():
            record = record_of(config.out, method, goal)
            if not record.exists():
                records.say(f"{method} {goal}")
                result = job.prune(method, goal)
                records.write_json(record, result)
                records.say(f"  {result['bits_per_character']:.3f} bits per character")
        if not (config.out / "layers.json").exists():
            records.say("each layer for itself")
            records.write_json(config.out / "layers.json", job.compare_layers())
    print(summarize(config))


if __name__ == "__main__":
    records.run(main, Config, __doc__)
