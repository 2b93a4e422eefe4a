"""Sparse training side by side: JaxPruner's baselines on CIFAR-10, in small.

    python -m experiments.claims.sparse_training --data-dir FOLDER --epochs 2

Nine methods train one ResNet of eight layers from the same parameters on the same
batches, to the same fraction of zeros (Lee et al., JaxPruner, arXiv:2304.14082). What
is evaluated is params as trained: their zeros are counted, not assumed.

All dense-to-sparse methods follow one cubic ramp from a tenth to three quarters of the
steps; sparse-to-sparse ones move their masks until three quarters. One finished run is
one JSON file; started again, the job skips those, and goes on with the rest from the
last checkpoint. `--summarize` only looks at what is there.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import compress, html_report, models, plots, records, train
from experiments import data as datasets
from experiments.benchmarks import measure
from experiments.claims.sparse_methods import METHODS, Plan
from experiments.variants import adamw

NAME = "sparse_training"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; runs of one folder differ in methods, sparsities and seeds alone."""

    out: Path = Path("runs/sparse_training")
    """Where everything goes; started again with the same options it continues."""
    data_dir: Path | None = None
    """A folder of parquet images; scikit-learn's digits when left out."""
    epochs: float = 2.0
    seeds: int = 1
    methods: tuple[str, ...] = tuple(METHODS)
    sparsities: tuple[float, ...] = (0.9, 0.95)
    width: int = 16
    batch_size: int = 32
    """Small, because what a layer keeps of a larger batch leaves a core's cache."""
    learning_rate: float = 4e-3
    train_images: int | None = None
    """Train on the first so many images; on all when left out."""
    test_images: int | None = None
    parallel: train.Parallel = "jit"
    """shard_map with XLA_FLAGS=--xla_force_host_platform_device_count=2 is the fastest
    on two cores."""
    save_every: int = 500
    summarize: bool = False
    """Train nothing: only make the result, the table and the picture."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of work."""

    method: str
    sparsity: float
    seed: int

    @property
    def label(self) -> str:
        """What progress lines say."""
        at = f" {100 * self.sparsity:g} %" if self.sparsity else ""
        return f"{METHODS[self.method][0]}{at}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Return where it lives."""
        return out / "runs" / f"{self.method}_{self.sparsity:g}" / f"seed_{self.seed}"


def runs_of(config: Config) -> list[Run]:
    """List the work: all methods of the first seed, then of the second."""
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {list(METHODS)}, got {unknown}")
    sparse = [method for method in config.methods if method != "dense"]
    runs = []
    for seed in range(config.seeds):
        if "dense" in config.methods:
            runs.append(Run("dense", 0.0, seed))
        runs += [
            Run(m, sparsity, seed) for sparsity in config.sparsities for m in sparse
        ]
    return runs


class Job:
    """What all runs share."""

    def __init__(self, config: Config):
        self.config = config
        data = datasets.load(config.data_dir)
        if data.kind != "images":
            raise ValueError(f"data_dir must hold images, got the text {data.name!r}")
        few = {k: v[: config.train_images] for k, v in data.train.items()}
        self.data = dataclasses.replace(data, train=few)
        self.test = {k: v[: config.test_images] for k, v in data.test.items()}
        self.size = models.ModelConfig("resnet", depth=1, width=config.width)
        self.apply, _ = models.build(self.size, self.data, seed=0)
        self.predict = compress.make_predict(self.apply)
        images = len(self.data.train["x"])
        self.steps = max(round(config.epochs * images / config.batch_size), 1)

    def run(self, run: Run) -> dict[str, Any]:
        """Train and evaluate one model."""
        config, start = self.config, time.perf_counter()
        plan = Plan(
            adamw(self.steps, config.learning_rate),
            run.sparsity,
            self.steps,
            jax.random.key(run.seed),
        )
        tx = METHODS[run.method][1](plan)
        loss = compress.make_loss(self.apply, None)
        _, params = models.build(self.size, self.data, seed=run.seed)

        def tell(step: int) -> None:
            seconds = time.perf_counter() - start
            records.say(f"  {run.label}: step {step} of {self.steps}, {seconds:.0f} s")

        result = train.fit(
            train.make_trainer(loss, tx, parallel=config.parallel),
            tx,
            params,
            lambda step: datasets.batch_at(
                self.data, seed=run.seed, step=step, size=config.batch_size
            ),
            train.TrainConfig(
                self.steps,
                config.batch_size,
                config.parallel,
                log_every=max(self.steps // 10, 1),
                save_every=config.save_every,
            ),
            directory=run.folder(config.out),
            probe=lambda params, state: {"sparsity": train.zero_fraction(params)},
            on_step=tell,
        )
        return {
            "method": run.method,
            "sparsity": run.sparsity,
            "seed": run.seed,
            **compress.evaluate(self.predict, result.params, self.test),
            **count_zeros(result.params),
            "epochs": config.epochs,
            "steps": self.steps,
            "train_images": len(self.data.train["x"]),
            "test_images": len(self.test["x"]),
            "num_params": models.num_params(params),
            "seconds": result.seconds,
            "hardware": measure.hardware(),
        }


def count_zeros(params: Any) -> dict[str, Any]:
    """Count exact zeros of all kernels, which are what the methods prune."""
    layers = {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "size": leaf.size,
            "zeros": int(np.sum(np.asarray(leaf) == 0)),
        }
        for path, leaf in jax.tree.leaves_with_path(params)
        if leaf.ndim >= 2
    }
    size = sum(layer["size"] for layer in layers.values())
    zeros = sum(layer["zeros"] for layer in layers.values())
    return {"actual_sparsity": zeros / size, "zeros": zeros, "layers": layers}


def finished(out: Path) -> list[dict[str, Any]]:
    """Read all results of a folder, in the order of the methods."""
    found = [json.loads(f.read_text()) for f in out.glob("runs/*/*/result.json")]
    order = list(METHODS)
    return sorted(
        found, key=lambda r: (r["sparsity"], order.index(r["method"]), r["seed"])
    )


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reduce seeds to mean and standard deviation."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["sparsity"]), []).append(result)
    rows = []
    for (method, sparsity), group in groups.items():
        accuracies = [result["accuracy"] for result in group]
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "seeds": len(group),
                "accuracy": float(np.mean(accuracies)),
                # One seed has no deviation, and 0 would claim that it has.
                "accuracy_std": float(np.std(accuracies, ddof=1))
                if len(group) > 1
                else None,
                "actual_sparsity": float(
                    np.mean([result["actual_sparsity"] for result in group])
                ),
                "seconds": float(np.median([result["seconds"] for result in group])),
            }
        )
    return rows


def percent(row: dict[str, Any] | None) -> str:
    """Write an accuracy and its deviation."""
    if row is None:
        return "-"
    text = f"{100 * row['accuracy']:.1f}"
    spread = row["accuracy_std"]
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def make_table(rows: list[dict[str, Any]]) -> str:
    """One line per method; accuracy and the zeros that were counted, per sparsity."""
    found = {(row["method"], row["sparsity"]): row for row in rows}
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    heads = ["method"]
    for sparsity in sparsities:
        heads += [f"accuracy at {100 * sparsity:g} %", "zeros"]
    lines = []
    for method, (label, _) in METHODS.items():
        if method == "dense" and ("dense", 0.0) in found:
            dense = found["dense", 0.0]
            cells = [percent(dense), f"{100 * dense['actual_sparsity']:.2f} %"]
            lines.append([label, *cells * max(len(sparsities), 1)])
        elif any((method, sparsity) in found for sparsity in sparsities):
            cells = []
            for sparsity in sparsities:
                row = found.get((method, sparsity))
                zeros = row and f"{100 * row['actual_sparsity']:.2f} %"
                cells += [percent(row), zeros or "-"]
            lines.append([label, *cells])
    return records.markdown(
        heads if sparsities else [*heads, "accuracy", "zeros"], lines
    )


def draw(rows: list[dict[str, Any]], title: str) -> Any:
    """Draw accuracy by method, a mark per sparsity, the dense model as a line."""
    plt = plots.plt
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    present = {row["method"] for row in rows if row["sparsity"]}
    methods = [method for method in METHODS if method in present]
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    for i, sparsity in enumerate(sparsities):
        mine = [row for row in rows if row["sparsity"] == sparsity]
        axis.errorbar(
            [methods.index(row["method"]) + 0.12 * (2 * i - 1) for row in mine],
            [100 * row["accuracy"] for row in mine],
            yerr=[100 * (row["accuracy_std"] or np.nan) for row in mine],
            fmt="os^v"[i % 4],
            capsize=3,
            markersize=8,
            color=["#1b7837", "#762a83", "#2166ac", "#d73027"][i % 4],
            label=f"{100 * sparsity:g} % zeros",
        )
    for row in rows:
        if row["method"] == "dense":
            height = 100 * row["accuracy"]
            axis.axhline(height, color="#222222", linestyle="--", label="dense")
    labels = [METHODS[method][0].replace(" ", "\n") for method in methods]
    axis.set_xticks(range(len(methods)), labels, fontsize=9)
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plots.clean(axis, title)
    return figure


def summarize(config: Config) -> str:
    """Write the result, the table and the picture of what is finished."""
    results = finished(config.out)
    if not results:
        raise ValueError(f"out must hold finished runs, got {str(config.out)!r}")
    rows = rows_of(results)
    seeds = max(row["seeds"] for row in rows)
    first = results[0]
    machines = []
    for result in results:
        machine = {k: v for k, v in result["hardware"].items() if k != "load_average"}
        if machine not in machines:
            machines.append(machine)
    settings = json.loads((config.out / "settings.json").read_text())
    table = make_table(rows)
    title = (
        f"{settings['data']}, ResNet of 8 layers ({first['num_params']:,} parameters), "
        f"{first['epochs']:g} epochs, {html_report.counted(seeds, 'seed')}"
    )
    summary = {
        "claim": "sparse training side by side",
        "hardware": machines,
        "settings": settings,
        "epochs": first["epochs"],
        "steps": first["steps"],
        "train_images": first["train_images"],
        "test_images": first["test_images"],
        "seeds": seeds,
        "rows": rows,
        "runs": results,
    }
    records.write_json(config.out / f"{NAME}.json", summary)
    records.write_atomically(config.out / f"{NAME}.md", table + "\n")
    figure = draw(rows, title)
    figure.savefig(config.out / f"{NAME}.png", dpi=110)
    plots.plt.close(figure)
    return table


def main(config: Config) -> None:
    """Run what is not finished, then show everything."""
    runs = runs_of(config)
    if not config.summarize:
        job = None
        settings = dataclasses.asdict(config)
        for key in ("out", "data_dir", "seeds", "methods", "sparsities", "summarize"):
            del settings[key]
        settings["data"] = "digits" if config.data_dir is None else config.data_dir.name
        del settings["save_every"]
        records.claim_folder(config.out, settings)
        for i, run in enumerate(runs):
            record = run.folder(config.out) / "result.json"
            if record.exists():
                continue
            records.say(f"run {i + 1} of {len(runs)}: {run.label}")
            job = job or Job(config)
            result = job.run(run)
            records.write_json(record, result)
            records.say(
                f"  accuracy {100 * result['accuracy']:.2f} %, zeros "
                f"{100 * result['actual_sparsity']:.3f} %, {result['seconds']:.0f} s"
            )
    print(summarize(config))


if __name__ == "__main__":
    records.run(main, Config, __doc__)
