"""The methods of `sparse_training`: each is one expression of jopt around an optimizer.

dense to sparse     random, magnitude, saliency, uniform or global: one cubic ramp
                    from a tenth to three quarters of the steps (Zhu and Gupta,
                    arXiv:1710.01878)
sparse gradients    STE: the ramp too, but the mask is chosen anew on every step,
                    among dense weights that all keep learning
sparse to sparse    static, SET (arXiv:1707.04780), RigL (arXiv:1911.11134): at full
                    sparsity from the start, masks move until three quarters
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jopt


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a method is made from."""

    inner: optax.GradientTransformation
    sparsity: float
    steps: int
    key: jax.Array

    @property
    def end(self) -> int:
        """The count of the last change of a mask."""
        return max(3 * self.steps // 4, 1)

    @property
    def every(self) -> int:
        """The steps between two changes."""
        return max(self.steps // 40, 1)

    @property
    def ramp(self) -> optax.Schedule:
        """Sparsity by count."""
        return jopt.schedules.cubic_sparsity(
            0.0, self.sparsity, begin_step=self.steps // 10, end_step=self.end
        )


def pruned(plan: Plan, scores: Any, **options: Any) -> optax.GradientTransformation:
    """Prune gradually by some scores."""
    return jopt.prune(
        plan.inner,
        sparsity=plan.ramp,
        every_steps=plan.every,
        end_step=plan.end,
        scores=scores,
        **options,
    )


def random_once() -> jopt.scores.Score:
    """Random scores under which what is pruned stays pruned, as JaxPruner's do.

    New numbers for all weights at each update would keep moving the mask, and what
    comes back has lost its value.
    """
    random = jopt.scores.random()

    def scores(inputs, state):
        return jnp.where(inputs.mask, random.scores(inputs, state), -1.0)

    return random._replace(scores=scores)


def competing(scores: Any) -> dict[str, Any]:
    """Let all leaves compete by normalised scores."""
    return {
        "scores": jopt.scores.normalized(scores),
        "allocation": jopt.allocation.global_ranking,
    }


# A name and what it makes. Layers keep the same share where they do not compete: what
# differs between the methods is what they keep, not where.
METHODS: dict[str, tuple[str, Callable[[Plan], optax.GradientTransformation]]] = {
    "dense": ("dense", lambda plan: plan.inner),
    "random": ("random", lambda plan: pruned(plan, random_once(), key=plan.key)),
    "magnitude": ("magnitude", lambda plan: pruned(plan, jopt.scores.magnitude)),
    "global_magnitude": (
        "global magnitude",
        lambda plan: pruned(plan, **competing(jopt.scores.magnitude)),
    ),
    "saliency": ("saliency", lambda plan: pruned(plan, jopt.scores.saliency)),
    "global_saliency": (
        "global saliency",
        lambda plan: pruned(plan, **competing(jopt.scores.saliency)),
    ),
    # The mask is chosen anew on every step, among all dense weights.
    "ste": (
        "STE magnitude",
        lambda plan: jopt.ste(plan.inner, sparsity=plan.ramp, every_steps=1),
    ),
    "static": (
        "static random",
        lambda plan: jopt.static_sparse(
            plan.inner,
            sparsity=plan.sparsity,
            allocation=jopt.allocation.uniform,
            key=plan.key,
        ),
    ),
    "set": (
        "SET",
        lambda plan: jopt.set_(
            plan.inner,
            sparsity=plan.sparsity,
            drop_fraction=jopt.schedules.cosine_drop(0.3, plan.end),
            every_steps=plan.every,
            end_step=plan.end,
            allocation=jopt.allocation.uniform,
            key=plan.key,
        ),
    ),
    "rigl": (
        "RigL",
        lambda plan: jopt.rigl(
            plan.inner,
            sparsity=plan.sparsity,
            drop_fraction=jopt.schedules.cosine_drop(0.3, plan.end),
            every_steps=plan.every,
            end_step=plan.end,
            allocation=jopt.allocation.uniform,
            key=plan.key,
        ),
    ),
}
