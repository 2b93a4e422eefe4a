"""A picture of every schedule, for the documentation.

python -m experiments.plot_schedules --out docs/schedules.png
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import tyro

import jopt

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the picture goes."""

    out: Path = Path("docs/schedules.png")


def panels():
    """Return title -> {label: schedule}."""
    s = jopt.schedules
    return {
        "sparsity": {
            "constant_sparsity(0.5)": s.constant_sparsity(0.5),
            "one_shot_sparsity(0.7, step=50)": s.one_shot_sparsity(0.7, step=50),
            "linear_sparsity(0.2, 0.8, ...)": s.linear_sparsity(
                0.2, 0.8, begin_step=20, end_step=150
            ),
            "cubic_sparsity(0, 0.9, ...)": s.cubic_sparsity(
                0.0, 0.9, begin_step=20, end_step=150
            ),
        },
        "warmup_stable_decay, by cooldown": {
            cooldown: s.warmup_stable_decay(
                1.0,
                warmup_steps=20,
                stable_steps=100,
                decay_steps=60,
                cooldown=cooldown,
            )
            for cooldown in ("linear", "cosine", "1-sqrt")
        },
        "bits": {
            "stepwise_bits({0: 8, 70: 6, 140: 4})": s.stepwise_bits(
                {0: 8, 70: 6, 140: 4}
            ),
            "gradual_bits(8, 2, ...)": s.gradual_bits(
                8, 2, begin_step=20, end_step=150
            ),
        },
        "temperature": {
            "temperature(8, 1, ...)": s.temperature(
                8.0, 1.0, begin_step=20, end_step=150
            ),
            "temperature(1, 4, ...)": s.temperature(
                1.0, 4.0, begin_step=20, end_step=150
            ),
        },
    }


def main(config: Config) -> None:
    """Draw one panel per family."""
    steps = jnp.arange(200)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for axis, (title, schedules) in zip(axes.flat, panels().items(), strict=True):
        for label, schedule in schedules.items():
            axis.plot(steps, jax.vmap(schedule)(steps), label=label, linewidth=2)
        axis.set_title(title, loc="left")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
