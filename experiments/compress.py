"""The main job: train a model, compress it in nine ways, and compare.

    python -m experiments.compress
    python -m experiments.compress --data-dir DIR --model gpt --steps 2000 --seeds 1

Every variant starts from the same parameters and sees the same batches as the dense
model, per seed. Accuracy is that of the file on disk: the artefact is saved, read back
and evaluated. A run that is killed at any moment continues when it is started again,
and ends with the same bits.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sklearn.metrics import f1_score, recall_score

import jopt
from experiments import data as datasets
from experiments import deploy, html_report, models, plots, records, train
from experiments.variants import INT8, VARIANTS, Variant

TEMPERATURE, SOFT_SHARE = 4.0, 0.7


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the main job; the defaults take two to three minutes on two cores."""

    out: Path = Path("runs/compress")
    """Where everything goes; started again with the same options it continues."""
    data_dir: Path | None = None
    """A folder of parquet images, or a text; scikit-learn's digits when left out."""
    model: Literal["resnet", "gpt"] = "resnet"
    steps: int = 280
    seeds: int = 2
    width: int | None = None
    """Channels or features: 16 for digits, 32 for larger images, 128 for a GPT."""
    depth: int | None = None
    """Blocks per stage, or layers: 1, or 4 for a GPT."""
    connections: Literal["plain", "residual", "dense"] = "residual"
    batch_size: int = 64
    learning_rate: float = 8e-3
    parallel: train.Parallel = "jit"
    save_every: int = 140
    variants: tuple[str, ...] = tuple(variant.name for variant in VARIANTS)
    """Which to make, dense among them; the same folder takes others later."""


def chosen(names: tuple[str, ...]) -> list[Variant]:
    """Return the variants of some names, in the order of the table."""
    known = [variant.name for variant in VARIANTS]
    if not set(names) <= set(known) or VARIANTS[0].name not in names:
        raise ValueError(
            f"variants must be {VARIANTS[0].name!r} and any of {known[1:]}, got "
            f"{list(names)}"
        )
    return [variant for variant in VARIANTS if variant.name in names]


def model_config(config: Config, data: datasets.Dataset) -> models.ModelConfig:
    """Fill in the sizes that were left out."""
    width = 128 if config.model == "gpt" else 16 if data.name == "digits" else 32
    depth = 4 if config.model == "gpt" else 1
    return models.ModelConfig(
        config.model, config.depth or depth, config.width or width, config.connections
    )


def make_loss(apply: models.Apply, teacher: models.Apply | None) -> train.Loss:
    """Cross entropy, mixed with the teacher's soft targets where there is one."""

    def loss(params, batch, teacher_params):
        logits = apply(params, batch["x"])
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, batch["y"]
        )
        hard = hard.mean()
        if teacher is None:
            return hard, {"loss": hard}
        soft = jopt.distillation.soft_target_loss(
            logits, teacher(teacher_params, batch["x"]), temperature=TEMPERATURE
        ).mean()
        mixed = (1 - SOFT_SHARE) * hard + SOFT_SHARE * soft
        return mixed, {"loss": hard, "soft_loss": soft}

    return loss


def evaluate(predict, params: Any, batch: datasets.Batch) -> dict[str, float]:
    """Measure a model on the test set."""
    losses, predictions = [], []
    for start in range(0, len(batch["x"]), 1000):
        part = {k: v[start : start + 1000] for k, v in batch.items()}
        loss, prediction = predict(params, part)
        losses.append(np.asarray(loss).ravel())
        predictions.append(np.asarray(prediction).ravel())
    truth, guess = batch["y"].ravel(), np.concatenate(predictions)
    loss = float(np.concatenate(losses).mean())
    return {
        "accuracy": float((truth == guess).mean()),
        "recall": float(recall_score(truth, guess, average="macro", zero_division=0)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "loss": loss,
        "bits_per_character": loss / float(np.log(2)),
    }


def make_predict(apply: models.Apply):
    """Compile loss and prediction per example."""

    @jax.jit
    def predict(params, batch):
        logits = apply(params, batch["x"])
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, batch["y"]
        )
        return loss, logits.argmax(-1)

    return predict


class Job:
    """The runs of one folder, in order, skipping what is finished."""

    def __init__(self, config: Config):
        self.config = config
        self.variants = chosen(config.variants)
        self.data = datasets.load(config.data_dir)
        self.test = datasets.test_batch(self.data)
        self.sizes = {
            False: model_config(config, self.data),
            True: models.student_of(model_config(config, self.data)),
        }
        self.applies = {
            small: models.build(size, self.data, seed=0)[0]
            for small, size in self.sizes.items()
        }
        # Variants that run the same program share its compilation.
        self.predicts = {}
        for variant in self.variants:
            key = self.program(variant)
            apply = deploy.deployed(self.applies[variant.is_student], variant)
            self.predicts.setdefault(key, make_predict(apply))

    def program(self, variant: Variant) -> str:
        """Name what runs a variant when it is deployed."""
        size = "student" if variant.is_student else "full"
        return f"{size} {variant.activations or 'float'}"

    def folder(self, variant: Variant, seed: int) -> Path:
        """Return where a run lives."""
        return self.config.out / "runs" / variant.name / f"seed_{seed}"

    def run_variant(self, variant: Variant, tell) -> list[dict[str, Any]]:
        """Run all seeds of a variant with one compiled step."""
        config = self.config
        files = [self.folder(variant, s) / "result.json" for s in range(config.seeds)]
        steps = variant.num_steps(config.steps)
        tx = variant.make_tx(max(steps, 1), config.learning_rate)
        trainer = None
        for seed, file in enumerate(files):
            if file.exists():
                tell(variant, seed, steps)
                continue
            if trainer is None:
                apply = self.applies[variant.is_student]
                if variant.activations is not None:
                    apply = jopt.fake_quantize(apply, INT8, activations=INT8)
                teacher = self.applies[False] if variant.has_teacher else None
                loss = make_loss(apply, teacher)
                trainer = train.make_trainer(loss, tx, parallel=config.parallel)
            result = self.run(variant, seed, trainer, tx, tell)
            records.write_json(file, result)
        return [json.loads(file.read_text()) for file in files]

    def run(self, variant: Variant, seed: int, trainer, tx, tell) -> dict[str, Any]:
        """Train, ship and evaluate one model."""
        config, folder = self.config, self.folder(variant, seed)
        _, params = models.build(self.sizes[variant.is_student], self.data, seed=seed)
        dense = self.folder(VARIANTS[0], seed) / "artefact"
        teacher = jopt.restore(dense) if variant.has_teacher else None
        if variant.share_of_steps < 1:
            params = jopt.restore(dense)

        def batch(step: int) -> datasets.Batch:
            size = config.batch_size
            return datasets.batch_at(self.data, seed=seed, step=step, size=size)

        result = train.fit(
            trainer,
            tx,
            params,
            batch,
            train.TrainConfig(
                variant.num_steps(config.steps),
                config.batch_size,
                config.parallel,
                log_every=max(config.steps // 50, 1),
                save_every=config.save_every,
            ),
            directory=folder,
            extras=teacher,
            probe=lambda params, state: {"sparsity": train.zero_fraction(params)},
            on_step=lambda step: tell(variant, seed, step),
        )
        artefact, apply = folder / "artefact", self.applies[variant.is_student]
        start = time.perf_counter()
        inputs = (batch(step)["x"] for step in range(deploy.CALIBRATION_BATCHES))
        shipped = deploy.ship(
            variant, apply, result.params, result.state, inputs, artefact
        )
        calibrating = time.perf_counter() - start if variant.activations else 0.0
        leaves = jax.tree.leaves(result.params)
        return {
            "variant": variant.name,
            "seed": seed,
            **evaluate(self.predicts[self.program(variant)], shipped, self.test),
            "num_params": sum(x.size for x in leaves),
            "nonzero_params": sum(int(jnp.count_nonzero(x)) for x in leaves),
            "bytes": deploy.bytes_on_disk(artefact),
            "seconds": result.seconds + calibrating,
        }

    def measure(self) -> dict[str, dict[str, float]]:
        """Count the operations of what is deployed, and time a batch through it."""
        programs, counts = {}, {}
        x = jnp.asarray(self.test["x"][: self.config.batch_size])
        for variant in self.variants:
            key, apply = self.program(variant), self.applies[variant.is_student]
            if key in programs:
                continue
            shipped = jopt.restore(self.folder(variant, 0) / "artefact")
            programs[key] = deploy.deployed(apply, variant), shipped
            params = shipped if variant.activations is None else shipped["params"]
            counts[key] = deploy.flops(apply, params, x)
        times = deploy.milliseconds(programs, x)
        keys = {variant.name: self.program(variant) for variant in self.variants}
        return {
            name: {"flops": counts[key], "milliseconds": times[key]}
            for name, key in keys.items()
        }


def summarise(
    results: dict[str, list[dict[str, Any]]], measured: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Reduce the seeds of each variant to mean and standard deviation."""
    rows = []
    for variant in chosen(tuple(results)):
        runs = results[variant.name]
        row: dict[str, Any] = {"name": variant.name, "label": variant.label}
        for key in ("accuracy", "recall", "f1", "loss", "bits_per_character"):
            values = [run[key] for run in runs]
            row[key] = float(np.mean(values))
            # One seed has no deviation, and 0 would claim that it has.
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{key}_std"] = spread
        for key in ("num_params", "nonzero_params", "bytes", "seconds"):
            row[key] = float(np.median([run[key] for run in runs]))
        row |= measured[variant.name]
        row["is_harmless"] = variant.is_harmless
        rows.append(row)
    return rows


def make_table(rows: list[dict[str, Any]], data: datasets.Dataset, seeds: int) -> Table:
    """Lay the summary out for the terminal."""
    dense = rows[0]
    title = (
        f"{data.name}: mean ±standard deviation, {html_report.counted(seeds, 'seed')}"
    )
    # Narrow on purpose: it is to fit 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.collapse_padding, table.pad_edge = 0, True, False
    columns = ["variant", "accuracy %", "F1 %"]
    columns += ["bits/char"] if data.kind == "text" else []
    columns += ["nonzero", "kB", "ratio", "MFLOP", "ms", "sec"]
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        cells = [row["label"]]
        cells += [html_report.percent(row, key, 1) for key in ("accuracy", "f1")]
        if data.kind == "text":
            cells.append(f"{row['bits_per_character']:.3f}")
        cells += [
            f"{row['nonzero_params']:,.0f}",
            f"{row['bytes'] / 1000:,.1f}",
            f"{dense['bytes'] / row['bytes']:.1f}x",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        table.add_row(*cells)
    return table


def main(config: Config) -> None:
    """Run what is not finished, then show everything."""
    start = time.perf_counter()
    console = Console()
    if config.steps < 10 or config.seeds < 1:
        raise ValueError(
            "steps must be at least 10 and seeds at least 1, "
            f"got {config.steps} and {config.seeds}"
        )
    chosen(config.variants)  # before a folder is made
    settings = dataclasses.asdict(config)
    del settings["out"], settings["variants"]
    records.claim_folder(config.out, settings)
    job = Job(config)
    results = {}
    with Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        lengths = [variant.num_steps(config.steps) for variant in job.variants]
        task = progress.add_task("starting", total=sum(lengths) * config.seeds)
        for i, variant in enumerate(job.variants):

            def tell(variant, seed, step, i=i):
                before = sum(lengths[:i]) * config.seeds + seed * lengths[i]
                text = f"{variant.label}, seed {seed}"
                progress.update(task, completed=before + step, description=text)

            results[variant.name] = job.run_variant(variant, tell)
        progress.update(task, description="done")
    rows = summarise(results, job.measure())
    table = make_table(rows, job.data, config.seeds)
    summary = {
        "data": job.data.name,
        "kind": job.data.kind,
        "model": dataclasses.asdict(job.sizes[False]),
        "steps": config.steps,
        "seeds": config.seeds,
        "test_examples": len(job.test["x"]),
        "environment": html_report.environment(),
        "rows": rows,
    }
    records.write_json(config.out / "results.json", summary)
    pictures = plots.draw_all(config.out, rows, job.variants)
    html_report.write(config.out / "report.html", summary, pictures, sys.argv[1:])
    console.print(table)
    console.print(
        f"{config.out / 'report.html'} has the pictures; "
        f"this call took {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    records.run(main, Config, __doc__)
