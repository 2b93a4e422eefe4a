"""What looking through a program costs: tracing, and the program that comes out.

    python -m experiments.benchmarks.programs --out FILE.json

The program is a transformer of 24 unrolled blocks. `trace` is one plain trace of it;
`overhead` what `jopt.rewrite` with the identity at every site adds to it, analysis and
second trace, over that: the median over rounds of two calls in turn, each with empty
caches. The limit is JAX's own evaluation of the traced program, which writes every
equation down once more. The optimized HLO of both must have the same operations.
"""

import collections
import dataclasses
import gc
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn

import jopt
from experiments.benchmarks import measure


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the model."""

    out: Path | None = None
    blocks: int = 24
    width: int = 32
    rounds: int = 15


class Transformer(nn.Module):
    """Pre-norm blocks of attention and MLP."""

    blocks: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, self.width)(tokens)
        for _ in range(self.blocks):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
            h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(h))
        return nn.Dense(64)(nn.LayerNorm()(x))


def operations(compiled) -> collections.Counter:
    """Count the operations of optimized HLO by kind."""
    found = re.findall(r"^\s*(?:ROOT )?\S+ = \S+ ([\w-]+)\(", compiled.as_text(), re.M)
    return collections.Counter(found)


def seconds_with_empty_caches(function) -> float:
    """Time one call, without what earlier ones left behind."""
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(config: Config) -> None:
    """Measure, and print or write the record."""
    model = Transformer(config.blocks, config.width)
    tokens = jnp.zeros((2, 16), jnp.int32)
    apply, params = jopt.functional(model, model.init(jax.random.key(0), tokens))
    identity = jopt.Handler(lambda use: use.run(), select=lambda site: True)
    rewritten = jopt.rewrite(apply, identity)
    traced = jax.make_jaxpr(apply)(params, tokens)

    def again(*args):
        return jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *jax.tree.leaves(args))

    seconds = collections.defaultdict(list)
    candidates = {
        "plain": lambda: jax.jit(apply).trace(params, tokens),
        "rewritten": lambda: jax.jit(rewritten).trace(params, tokens),
        "sites": lambda: jopt.sites(apply, params, tokens),
        "evaluated_again": lambda: jax.jit(again).trace(params, tokens),
    }
    for _ in range(config.rounds + 1):  # the first one also imports and warms up
        for name, run in candidates.items():
            seconds[name].append(seconds_with_empty_caches(run))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    counts = [
        operations(jax.jit(f).lower(params, tokens).compile())
        for f in (apply, rewritten)
    ]
    results = {
        "sites": len(jopt.sites(apply, params, tokens)),
        "seconds": medians,
        "overhead": statistics.median(
            rewritten / plain - 1
            for rewritten, plain in zip(
                seconds["rewritten"][1:], seconds["plain"][1:], strict=True
            )
        ),
        "limit": medians["evaluated_again"] / medians["plain"],
        "floor": 0.2,
        "hlo_operations": [sum(c.values()) for c in counts],
        "hlo_identical": counts[0] == counts[1],
    }
    measure.write(results, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
