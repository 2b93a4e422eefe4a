"""What training on the quantized grid adds to a training step.

    python -m experiments.benchmarks.training --out FILE.json --text
    ../shared/data/shakespeare

The experiments' ResNet and GPT, loss, gradients and AdamW, everything donated; plain
and quantized steps alternate in one process.
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


def steppers(apply, params, batch):
    """Return a function per optimizer that takes one training step."""
    transformations = {
        "plain": optax.adamw(1e-3),
        "int8": jopt.quantize_weights(
            optax.adamw(1e-3), jopt.QuantSpec(jopt.formats.int8)
        ),
        "int4": jopt.quantize_weights(
            optax.adamw(1e-3), jopt.QuantSpec(jopt.formats.int4)
        ),
    }
    loss = make_loss(apply, None)

    def stepper(tx):
        trainer = train.make_trainer(loss, tx)
        carry = [trainer.replicate(params), trainer.replicate(tx.init(params))]
        placed = trainer.split(batch)

        def run():
            *carry[:], _ = trainer.step(*carry, None, placed)
            return carry[0]

        return run

    return {name: stepper(tx) for name, tx in transformations.items()}


def compare(config: models.ModelConfig, data: datasets.Dataset, size: int, rounds: int):
    """Time the steps of one model."""
    apply, params = models.build(config, data, seed=0)
    batch = datasets.batch_at(data, seed=0, step=0, size=size)
    medians = measure.alternate(steppers(apply, params, batch), rounds=rounds, warmup=2)
    return {
        "model": dataclasses.asdict(config),
        "batch_size": size,
        "num_params": models.num_params(params),
        "milliseconds": {name: 1e3 * s for name, s in medians.items()},
        "over_plain": {name: s / medians["plain"] for name, s in medians.items()},
        "floor": 1.1,
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
