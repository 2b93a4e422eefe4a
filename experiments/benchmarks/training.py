"""What quantization-aware training adds to a training step: time, temporary memory.

    python -m experiments.benchmarks.training --out FILE.json --text
    ../shared/data/shakespeare

The experiments' ResNet and GPT, loss, gradients and AdamW, everything donated; plain
and quantized steps alternate in one process. `int8` and `int4` train weights on their
grid; the others round weights and activations in the forward pass, with ranges of each
batch per token (image) or per tensor, or with static ranges.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

import jopt
from experiments import data as datasets
from experiments import models, train
from experiments.benchmarks import measure
from experiments.compress import make_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    out: Path | None = None
    text: Path | None = None
    """A text for the GPT; without it characters are drawn at random."""
    rounds: int = 15


def random_images(classes: int = 10) -> datasets.Dataset:
    """Return pictures of CIFAR's shape: a step's time does not depend on its data."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 32, 32, 3)).astype(np.float32)
    y = rng.integers(0, classes, 256).astype(np.int32)
    return datasets.Dataset(
        "random", "images", {"x": x, "y": y}, {"x": x, "y": y}, classes
    )


def random_text() -> datasets.Dataset:
    """Return characters at random."""
    x = np.random.default_rng(0).integers(0, 65, 20_000).astype(np.int32)
    return datasets.Dataset("random", "text", {"x": x}, {"x": x}, 65, 128)


INT8, INT4 = jopt.QuantSpec(jopt.formats.int8), jopt.QuantSpec(jopt.formats.int4)
PER_TENSOR = jopt.QuantSpec(jopt.formats.int8, axis=())


def variants(apply, params, batch):
    """Return by name what computes the loss, and the optimizer."""
    tx, x = optax.adamw(1e-3), batch["x"]
    static = jopt.calibrate(apply, params, [x])
    return {
        "plain": (apply, tx),
        "int8": (apply, jopt.quantize_weights(tx, INT8)),
        "int4": (apply, jopt.quantize_weights(tx, INT4)),
        "w8a8_token": (jopt.fake_quantize(apply, INT8, activations=INT8), tx),
        "w8a8_tensor": (jopt.fake_quantize(apply, INT8, activations=PER_TENSOR), tx),
        "w8a8_static": (jopt.fake_quantize(apply, static), tx),
    }


def stepper(apply, tx, params, batch):
    """Return a function that takes one training step, and its temporary bytes."""
    trainer = train.make_trainer(make_loss(apply, None), tx)
    carry = [trainer.replicate(params), trainer.replicate(tx.init(params))]
    placed = trainer.split(batch)
    lowered = trainer.step.lower(*carry, None, placed)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes

    def run():
        *carry[:], _ = trainer.step(*carry, None, placed)
        return carry[0]

    return run, memory


def compare(config: models.ModelConfig, data: datasets.Dataset, size: int, rounds: int):
    """Time the steps of one model."""
    apply, params = models.build(config, data, seed=0)
    batch = datasets.batch_at(data, seed=0, step=0, size=size)
    runs, memory = {}, {}
    for name, (function, tx) in variants(apply, params, batch).items():
        runs[name], memory[name] = stepper(function, tx, params, batch)
    medians = measure.alternate(runs, rounds=rounds, warmup=2)
    return {
        "model": dataclasses.asdict(config),
        "batch_size": size,
        "num_params": models.num_params(params),
        "milliseconds": {name: 1e3 * s for name, s in medians.items()},
        "over_plain": {name: s / medians["plain"] for name, s in medians.items()},
        "temporary_bytes": memory,
        "temporary_over_plain": {
            name: m / memory["plain"] for name, m in memory.items()
        },
        "floor": {"weights": 1.1, "w8a8": 1.15, "temporary": 1.06},
    }


def main(config: Config) -> None:
    """Run both models and write one record."""
    text = (
        random_text() if config.text is None else datasets.load(config.text, length=128)
    )
    resnet = models.ModelConfig("resnet", depth=1, width=32)
    gpt = models.ModelConfig("gpt", depth=4, width=128)
    measure.write(
        {
            "resnet": compare(resnet, random_images(), 64, config.rounds),
            "gpt": compare(gpt, text, 16, config.rounds),
            "devices": jax.device_count(),
        },
        config.out,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
