"""What the main job compares: each variant is an Optax transformation and a file
format.

Everything that a variant does to parameters is in its `make_tx`, one expression of jopt
around the same AdamW; the loss, the loop and the data are those of the dense model.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import optax

import jopt

INT8 = jopt.QuantSpec(jopt.formats.int8)
INT4 = jopt.QuantSpec(jopt.formats.int4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    label: str
    make_tx: Callable[[int, float], optax.GradientTransformation]  # (steps, rate)
    spec: jopt.QuantSpec | None = None  # how weights are stored
    is_student: bool = False
    has_teacher: bool = False
    activations: Literal["static", "dynamic"] | None = None  # ranges of int8 inputs
    share_of_steps: float = 1.0  # below one it starts from what the dense run ended at
    is_harmless: bool = False  # what practitioners expect to cost no accuracy

    def num_steps(self, steps: int) -> int:
        """Return how many steps it trains."""
        return round(steps * self.share_of_steps)


def adamw(steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW with warmup, plateau and cooldown: the inner optimizer of all variants."""
    warmup, decay = max(steps // 20, 1), max(steps // 3, 1)
    schedule = jopt.schedules.warmup_stable_decay(
        rate,
        warmup_steps=warmup,
        stable_steps=max(steps - warmup - decay, 0),
        decay_steps=decay,
        cooldown="1-sqrt",
    )
    return optax.adamw(schedule, weight_decay=1e-3)


def gradually(sparsity: float) -> Callable[[int, float], optax.GradientTransformation]:
    """Prune the smallest weights over six tenths of the run, then heal."""

    def make_tx(steps: int, rate: float) -> optax.GradientTransformation:
        end = max(6 * steps // 10, 1)
        ramp = jopt.schedules.cubic_sparsity(0.0, sparsity, end_step=end)
        return jopt.prune(
            adamw(steps, rate),
            sparsity=ramp,
            every_steps=max(steps // 30, 1),
            end_step=end,
            # The first and the last layer are small and needed: let all compete.
            allocation=jopt.allocation.global_ranking,
        )

    return make_tx


def two_of_four(steps: int, rate: float) -> optax.GradientTransformation:
    """Keep two of every four inputs, chosen anew until the middle of the run."""
    return jopt.prune(
        adamw(steps, rate),
        pattern=jopt.NM(2, 4),
        every_steps=max(steps // 40, 1),
        begin_step=steps // 4,
        end_step=max(steps // 2, steps // 4),
        # A grey picture has one input channel: its first kernel stays dense.
        select=lambda path, leaf: leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0,
    )


def on_grid(
    spec: jopt.QuantSpec,
) -> Callable[[int, float], optax.GradientTransformation]:
    """Train on the quantized grid from a quarter of the run on."""
    return lambda steps, rate: jopt.quantize_weights(
        adamw(steps, rate), spec, begin_step=steps // 4
    )


def sparse_on_grid(steps: int, rate: float) -> optax.GradientTransformation:
    """Prune 80 % and quantize to int8 together."""
    return jopt.quantize_weights(
        gradually(0.8)(steps, rate), INT8, begin_step=steps // 4
    )


def tuned(steps: int, rate: float) -> optax.GradientTransformation:
    """Train on from the dense model, at a tenth of the rate."""
    return adamw(steps, rate / 10)


VARIANTS = [
    Variant("dense", "dense", adamw),
    Variant("sparse90", "90 % pruned", gradually(0.9), is_harmless=True),
    Variant("sparse24", "2:4", two_of_four),
    Variant("int8", "int8", on_grid(INT8), INT8, is_harmless=True),
    Variant("int4", "int4", on_grid(INT4), INT4),
    Variant("sparse80_int8", "80 % pruned + int8", sparse_on_grid, INT8),
    # Weights and inputs in int8, multiplied as int8: calibrated, or trained for it.
    Variant(
        "w8a8",
        "int8 x int8",
        adamw,
        INT8,
        activations="static",
        share_of_steps=0.0,
        is_harmless=True,
    ),
    Variant(
        "w8a8_trained",
        "int8 x int8, trained",
        tuned,
        INT8,
        activations="dynamic",
        share_of_steps=0.25,
    ),
    Variant("student", "student (1/4)", adamw, is_student=True),
    Variant(
        "distilled",
        "student, taught",
        adamw,
        is_student=True,
        has_teacher=True,
    ),
]
