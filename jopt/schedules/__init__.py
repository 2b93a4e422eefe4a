"""Schedules: step count -> value, plain `optax.Schedule`s for anything that ramps.

Reading order: `sparsity` (how much is pruned), `regrowth` (how much of a moving mask
moves), `learning_rate` (warmup-stable-decay), `precision` (bits), `softness`
(temperature, and the way to a grid). What Optax has is not repeated here: a constant,
cosine, one-cycle or restarted learning rate, and `optax.join_schedules` to put any of
these one after another.
"""

from jopt.schedules.learning_rate import (
    warmup_stable_decay as warmup_stable_decay,
)
from jopt.schedules.precision import gradual_bits as gradual_bits
from jopt.schedules.precision import stepwise_bits as stepwise_bits
from jopt.schedules.regrowth import cosine_drop as cosine_drop
from jopt.schedules.softness import sigmoid_softness as sigmoid_softness
from jopt.schedules.softness import temperature as temperature
from jopt.schedules.sparsity import (
    constant_sparsity as constant_sparsity,
)
from jopt.schedules.sparsity import (
    cubic_sparsity as cubic_sparsity,
)
from jopt.schedules.sparsity import (
    geometric_sparsity as geometric_sparsity,
)
from jopt.schedules.sparsity import (
    linear_sparsity as linear_sparsity,
)
from jopt.schedules.sparsity import (
    one_shot_sparsity as one_shot_sparsity,
)
