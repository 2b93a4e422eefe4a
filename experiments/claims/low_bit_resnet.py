"""Weights and activations in few bits: a ResNet on CIFAR-10, after and in training.

    python -m experiments.claims.low_bit_resnet --data-dir FOLDER

A float ResNet of eight layers is trained once. Then, at W8A8, W4A8 and W4A4 (weights in
integers with a scale per output, the inputs of all products in integers with one static
range each):

    PTQ     GPTQ for the weights, percentiles of eight batches for the ranges
    STE     trained on with rounded weights and inputs, ranges from each batch
    LSQ     the same with learned ranges (Esser et al., arXiv:1902.08153)
    PARQ    weights annealed to the grid by PARQ's map (arXiv:2503.15748), inputs as STE

all of the last three from the float model, for the same further epochs; "float, longer"
trains on as they do and rounds nothing. What is evaluated are codes, executed as such.
Started again, the job skips what is finished and goes on from the last checkpoint.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import optax

import jopt
from experiments import compress, models, plots, records, train
from experiments import data as datasets
from experiments.benchmarks import measure
from experiments.variants import adamw

NAME = "low_bit_resnet"
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
METHODS = {"ptq": "PTQ", "ste": "STE", "lsq": "LSQ", "parq": "PARQ"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options."""

    out: Path = Path("runs/low_bit_resnet")
    """Where everything goes; started again with the same options it continues."""
    data_dir: Path | None = None
    """A folder of parquet images; scikit-learn's digits when left out."""
    epochs: float = 4.0
    """Of the float model."""
    more_epochs: float = 2.0
    """Of training on, for each row that trains."""
    width: int = 16
    batch_size: int = 32
    learning_rate: float = 4e-3
    calibration_batches: int = 8
    percentile: float = 99.99
    save_every: int = 500
    summarize: bool = False
    """Train nothing: only make the result, the table and the picture."""


def specs_of(width: str) -> tuple[jopt.QuantSpec, jopt.QuantSpec]:
    """Return the specs of weights and of inputs."""
    weight_bits, input_bits = WIDTHS[width]
    weights = jopt.QuantSpec(getattr(jopt.formats, f"int{weight_bits}"))
    # Most inputs are results of a relu: a zero point spares them the sign.
    form = getattr(jopt.formats, f"uint{input_bits}")
    return weights, jopt.QuantSpec(form, symmetric=False, axis=())


class Job:
    """The float model, and what is made of it."""

    def __init__(self, config: Config):
        self.config = config
        self.data = datasets.load(config.data_dir)
        if self.data.kind != "images":
            raise ValueError(
                f"data_dir must hold images, got the text {self.data.name!r}"
            )
        size = models.ModelConfig("resnet", depth=1, width=config.width)
        self.apply, self.first = models.build(size, self.data, seed=0)
        self.calibration = [
            datasets.batch_at(self.data, seed=1, step=i, size=config.batch_size)["x"]
            for i in range(config.calibration_batches)
        ]

    def fit(
        self, name: str, apply: models.Apply, first: Any, tx: Any, steps: int, seed: int
    ) -> Any:
        """Train and return the params, or take what was trained."""
        config, artefact = self.config, self.config.out / "models" / name
        if not jopt.steps(artefact):
            start = time.perf_counter()

            def tell(step: int) -> None:
                seconds = time.perf_counter() - start
                records.say(f"  {name}: step {step} of {steps}, {seconds:.0f} s")

            result = train.fit(
                train.make_trainer(compress.make_loss(apply, None), tx),
                tx,
                first,
                lambda step: datasets.batch_at(
                    self.data, seed=seed, step=step, size=config.batch_size
                ),
                train.TrainConfig(
                    steps,
                    config.batch_size,
                    log_every=max(steps // 10, 1),
                    save_every=config.save_every,
                ),
                directory=config.out / "training" / name,
                on_step=tell,
            )
            jopt.save(artefact, result.params, step=steps)
        return jopt.restore(artefact, like=first)

    def steps(self, epochs: float) -> int:
        """Return how many steps some epochs are."""
        images = len(self.data.train["x"])
        return max(round(epochs * images / self.config.batch_size), 1)

    def train(self) -> None:
        """Train the float model."""
        steps = self.steps(self.config.epochs)
        tx = adamw(steps, self.config.learning_rate)
        self.params = self.fit("float", self.apply, self.first, tx, steps, seed=0)

    def tuned(self, name: str, apply: models.Apply, first: Any, wrap: Any) -> Any:
        """Train on, at a tenth of the rate."""
        steps = self.steps(self.config.more_epochs)
        tx = wrap(adamw(steps, self.config.learning_rate / 10), steps)
        return self.fit(name, apply, first, tx, steps, seed=2)

    def calibrated(self, weights: Any, inputs: Any, params: Any) -> jopt.Calibration:
        """Measure static ranges of all inputs."""
        return jopt.calibrate(
            self.apply,
            params,
            self.calibration,
            spec=weights,
            activations=inputs,
            observer=jopt.observers.percentile(self.config.percentile),
            progress=False,
        )

    def run(self, method: str, width: str) -> dict[str, Any]:
        """Make one row."""
        start = time.perf_counter()
        if method == "float":
            packed, apply = self.params, self.apply
        elif method == "longer":
            packed = self.tuned("longer", self.apply, self.params, lambda tx, _: tx)
            apply = self.apply
        else:
            packed, ranges = getattr(self, f"by_{method}")(width)
            apply = jopt.execute(self.apply, activations=ranges)
        seconds = time.perf_counter() - start
        predict = compress.make_predict(apply)
        return {
            "method": method,
            "width": width,
            "accuracy": compress.evaluate(predict, packed, self.data.test)["accuracy"],
            "test_images": len(self.data.test["x"]),
            "num_params": models.num_params(self.params),
            "seconds": seconds,
            "hardware": measure.hardware(),
        }

    def by_ptq(self, width: str) -> Any:
        """Round the trained model."""
        weights, inputs = specs_of(width)
        packed, _ = jopt.gptq(
            self.apply, self.params, self.calibration, weights, progress=False
        )
        return packed, self.calibrated(weights, inputs, jopt.dequantize(packed))

    def by_ste(self, width: str) -> Any:
        """Train on, ranges from each batch; static ones afterwards."""
        weights, inputs = specs_of(width)
        rounded = jopt.fake_quantize(self.apply, weights, activations=inputs)
        params = self.tuned(f"ste_{width}", rounded, self.params, lambda tx, _: tx)
        calibration = self.calibrated(weights, inputs, params)
        return jopt.quantize(params, calibration), calibration

    def by_lsq(self, width: str) -> Any:
        """Train the ranges too."""
        weights, inputs = specs_of(width)
        rounded, init_ranges = jopt.fake_quantize(
            self.apply, weights, activations=inputs, ranges="learned"
        )
        first = {
            "params": self.params,
            "ranges": init_ranges(self.params, self.calibration[0]),
        }

        def apply(tree: Any, x: jax.Array) -> jax.Array:
            return rounded(tree["params"], x, ranges=tree["ranges"])

        tree = self.tuned(f"lsq_{width}", apply, first, lambda tx, _: tx)
        return jopt.quantize(tree["params"], tree["ranges"]), tree["ranges"]

    def by_parq(self, width: str) -> Any:
        """Anneal weights to the grid."""
        weights, inputs = specs_of(width)

        def wrap(
            tx: optax.GradientTransformation, steps: int
        ) -> optax.GradientTransformation:
            softness = jopt.schedules.sigmoid_softness(
                begin_step=0, end_step=steps // 2
            )
            return jopt.quantize_weights(
                tx, weights, projection=jopt.projections.parq(softness)
            )

        rounded = jopt.fake_quantize(self.apply, None, activations=inputs)
        params = self.tuned(f"parq_{width}", rounded, self.params, wrap)
        calibration = self.calibrated(weights, inputs, params)
        return jopt.quantize(params, weights), calibration


def work() -> list[tuple[str, str]]:
    """List (method, width), the float models first."""
    rows = [(method, width) for width in WIDTHS for method in METHODS]
    return [("float", "-"), ("longer", "-"), *rows]


def record_of(out: Path, method: str, width: str) -> Path:
    """Return where a result lies."""
    return out / "runs" / f"{method}_{width}" / "result.json"


def make_table(results: list[dict[str, Any]]) -> str:
    """One line per method, a column per width."""
    found = {(r["method"], r["width"]): r["accuracy"] for r in results}
    rows = []
    for method, label in (("float", "float"), ("longer", "float, longer")):
        if (method, "-") in found:
            rows.append([label, *[f"{100 * found[method, '-']:.2f}"] * len(WIDTHS)])
    for method, label in METHODS.items():
        mine = [found.get((method, width)) for width in WIDTHS]
        if any(accuracy is not None for accuracy in mine):
            rows.append(
                [label, *("-" if a is None else f"{100 * a:.2f}" for a in mine)]
            )
    return records.markdown(["accuracy, %", *WIDTHS], rows)


def draw(results: list[dict[str, Any]]) -> Any:
    """Draw the accuracy of each method at each width."""
    plt = plots.plt
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colors = ["#999999", "#2166ac", "#1b7837", "#762a83"]
    for (method, label), color in zip(METHODS.items(), colors, strict=True):
        mine = {
            r["width"]: 100 * r["accuracy"] for r in results if r["method"] == method
        }
        axis.plot(list(mine), list(mine.values()), "o-", color=color, label=label)
    for method, style in (("float", "--"), ("longer", ":")):
        for r in results:
            if r["method"] == method:
                label = "float" if method == "float" else "float, trained longer"
                axis.axhline(
                    100 * r["accuracy"], color="#222222", linestyle=style, label=label
                )
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False)
    plots.clean(axis, "Weights and inputs in few bits")
    return figure


def summarize(config: Config) -> str:
    """Write the result, the table and the picture of what is finished."""
    files = [record_of(config.out, *item) for item in work()]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results:
        raise ValueError(f"out must hold finished runs, got {str(config.out)!r}")
    table = make_table(results)
    summary = {
        "claim": "weights and activations in few bits",
        "hardware": results[0]["hardware"],
        "settings": json.loads((config.out / "settings.json").read_text()),
        "seeds": 1,
        "results": results,
    }
    records.write_json(config.out / f"{NAME}.json", summary)
    records.write_atomically(config.out / f"{NAME}.md", table + "\n")
    figure = draw(results)
    figure.savefig(config.out / f"{NAME}.png", dpi=110)
    plots.plt.close(figure)
    return table


def main(config: Config) -> None:
    """Train and round what is not finished, then show everything."""
    if not config.summarize:
        settings = dataclasses.asdict(config)
        for key in ("out", "data_dir", "save_every", "summarize"):
            del settings[key]
        settings["data"] = config.data_dir and config.data_dir.name
        records.claim_folder(config.out, settings)
        job = Job(config)
        job.train()
        for method, width in work():
            record = record_of(config.out, method, width)
            if not record.exists():
                records.say(f"{method} {width}")
                result = job.run(method, width)
                records.write_json(record, result)
                records.say(f"  {100 * result['accuracy']:.2f} %")
    print(summarize(config))


if __name__ == "__main__":
    records.run(main, Config, __doc__)
