"""Generation with a key-value cache: the same GPT, its memory in fewer bits.

    python -m experiments.generate --data-dir FOLDER
    python -m experiments.generate --data-dir FOLDER --checkpoint runs/one_shot/dense

A GPT (trained here, briefly, or restored) continues a prompt, one character after the
other, with keys and values of the past in a cache of floats and in caches of few bits.
Then every cache is given the characters that the float cache led to, and the table says
how far its logits are from those of the float cache at most, and at the last character,
beside the bound there: to first order in the rounding errors |k - k'| <= e of a cache,

    |logit' - logit| <= sum over layers, tokens, heads, features of |d logit / d k| e,

for keys and values together, from gradients by reverse mode and the e that
`jopt.KeyValueCache.error_bounds` returns.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jopt
from experiments import compress, models, records, train
from experiments import data as datasets
from experiments.variants import adamw

Spec = jopt.QuantSpec | None
INT4 = jopt.QuantSpec(jopt.formats.int4)
# name -> how keys and values are stored
CACHES: dict[str, tuple[Spec, Spec]] = {
    "float32": (None, None),
    "int8": (jopt.QuantSpec(jopt.formats.int8),) * 2,
    "fp8_e4m3": (jopt.QuantSpec(jopt.formats.fp8_e4m3),) * 2,
    "int4": (INT4, INT4),
    "int4, keys per channel": (
        jopt.QuantSpec(jopt.formats.int4, axis=(-2, -1), group_size=16),
        INT4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; the defaults take a minute or two on two cores."""

    out: Path = Path("runs/generate")
    """Where training goes on, and the results go."""
    data_dir: Path | None = None
    """A text, or a folder with one; scikit-learn's descriptions when left out."""
    checkpoint: Path | None = None
    """Params of a GPT of the sizes below, as `jopt.save` stored them; none is trained
    then."""
    steps: int = 300
    width: int = 128
    depth: int = 4
    heads: int = 4
    length: int = 128
    """Characters that the model sees at once, and the capacity of the caches."""
    batch_size: int = 16
    learning_rate: float = 3e-3
    prompt: str = "The "
    num_tokens: int = 96
    """Characters to generate; with the prompt at most `length`."""
    temperature: float = 0.8
    """0 for the likeliest character each time."""
    rows: int = 4
    """Continuations at once."""
    seed: int = 0


def make_caches(
    size: models.ModelConfig, shape: tuple[int, int], keys: Spec, values: Spec
) -> list[jopt.KeyValueCache]:
    """Make an empty cache per layer for so many (rows, characters)."""
    full = (*shape, size.heads, size.width // size.heads)
    return [jopt.init_cache(full, keys, value_spec=values) for _ in range(size.depth)]


@functools.partial(jax.jit, static_argnames=("apply", "num_tokens"))
def generate(
    apply: models.Apply,
    params: Any,
    prompt: jax.Array,
    caches: Any,
    key: jax.Array,
    *,
    num_tokens: int,
    temperature: jax.Array | float,
) -> tuple[jax.Array, jax.Array, Any]:
    """Continue prompts by one character after the other.

    Args:
        apply: of a GPT.
        params: its params.
        prompt: int `[rows, characters]`.
        caches: empty, or with what stands before the prompts.
        key: a PRNG key.
        num_tokens: how many characters to generate.
        temperature: logits are divided by it; 0 takes the largest.

    Returns:
        The characters `[rows, num_tokens]`, the logits `[rows, num_tokens, classes]`
        that they were drawn from, and the caches, without the last character.
    """
    keys = jax.random.split(key, num_tokens)

    def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
        warm = jnp.maximum(temperature, 1e-6)
        drawn = jax.random.categorical(key, logits / warm)
        return jnp.where(temperature > 0, drawn, logits.argmax(-1))

    def step(carry: Any, key: jax.Array) -> Any:
        token, caches = carry
        logits, caches = apply(params, token[:, None], caches)
        token = draw(key, logits[:, 0])
        return (token, caches), (token, logits[:, 0])

    logits, caches = apply(params, prompt, caches)
    first = draw(keys[0], logits[:, -1])
    (_, caches), (tokens, after) = jax.lax.scan(step, (first, caches), keys[1:])
    tokens = jnp.concatenate([first[None], tokens])
    after = jnp.concatenate([logits[None, :, -1], after])
    return jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(after, 0, 1), caches


@functools.partial(jax.jit, static_argnames="apply")
def replay(
    apply: models.Apply, params: Any, tokens: jax.Array, caches: Any
) -> tuple[jax.Array, Any]:
    """Give caches characters one by one; return all logits `[rows, n, classes]`."""

    def step(caches: Any, token: jax.Array) -> Any:
        logits, caches = apply(params, token[:, None], caches)
        return caches, logits[:, 0]

    caches, logits = jax.lax.scan(step, caches, jnp.moveaxis(tokens, 0, 1))
    return jnp.moveaxis(logits, 0, 1), caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Disturbed:
    """Stands for a cache: reads all keys and values of a text with errors added."""

    key_error: jax.Array  # [rows, n, heads, features]
    value_error: jax.Array
    length: jax.Array  # [rows], 0
    keys: jax.Array | None = None
    values: jax.Array | None = None

    def append(self, keys: jax.Array, values: jax.Array) -> "Disturbed":
        """Take the whole text."""
        return dataclasses.replace(
            self, keys=keys + self.key_error, values=values + self.value_error
        )

    def read(self, positions: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Return it, and the causal mask."""
        slots = jnp.arange(self.key_error.shape[1])
        mask = slots[None, None] <= positions[..., None]
        return self.keys, self.values, mask[:, None]


@functools.partial(jax.jit, static_argnames="apply")
def logit_bound(
    apply: models.Apply, params: Any, tokens: jax.Array, caches: Any
) -> jax.Array:
    """Bound the error of the last logits, to first order in those of the caches.

    |logit' - logit| <= sum |d logit / d k| e_k + sum |d logit / d v| e_v

    Args:
        apply: of a GPT.
        params: its params.
        tokens: int `[1, n]`: all that was appended to the caches.
        caches: of a single row.

    Returns:
        `[classes]`, one bound for each logit.
    """
    n = tokens.shape[1]
    length = jnp.zeros_like(caches[0].length)
    errors = [
        tuple(jnp.broadcast_to(e, c.shape)[:, :n] for e in c.error_bounds())
        for c in caches
    ]

    def last_logits(disturbances: Any) -> jax.Array:
        disturbed = [Disturbed(k, v, length) for k, v in disturbances]
        return apply(params, tokens, disturbed)[0][0, -1]

    slopes = jax.jacrev(last_logits)(jax.tree.map(jnp.zeros_like, errors))
    parts = jax.tree.map(
        lambda slope, e: jnp.sum(jnp.abs(slope) * e[None], axis=range(1, slope.ndim)),
        slopes,
        errors,
    )
    return sum(jax.tree.leaves(parts))


def trained(config: Config, size: models.ModelConfig, data: datasets.Dataset) -> Any:
    """Return the function and trained params: restored, or trained now."""
    apply, first = models.build(size, data, seed=config.seed)
    if config.checkpoint is not None:
        tree = jopt.restore(config.checkpoint)
        params = tree.get("params", tree)
        found, wanted = (jax.tree.map(np.shape, p) for p in (params, first))
        if found != wanted:
            raise ValueError(
                "checkpoint must hold a GPT of the sizes asked for, got other shapes "
                f"in {str(config.checkpoint)!r}; give the --width, --depth, --length "
                "and --data-dir that it was trained with"
            )
        return apply, params
    tx = adamw(config.steps, config.learning_rate)
    result = train.fit(
        train.make_trainer(compress.make_loss(apply, None), tx),
        tx,
        first,
        lambda step: datasets.batch_at(
            data, seed=config.seed, step=step, size=config.batch_size
        ),
        train.TrainConfig(
            config.steps, config.batch_size, log_every=max(config.steps // 5, 1)
        ),
        directory=config.out / "training",
        on_step=lambda step: records.say(f"  step {step} of {config.steps}"),
    )
    return apply, result.params


def encode(prompt: str, characters: str) -> np.ndarray:
    """Turn a prompt into codes."""
    unknown = sorted(set(prompt) - set(characters))
    if unknown or not prompt:
        raise ValueError(
            f"prompt must be one or more characters of the text, got {prompt!r} with "
            f"{unknown}; choose another --prompt"
        )
    return np.array([characters.index(c) for c in prompt], np.int32)


def measure(
    config: Config, size: models.ModelConfig, apply: models.Apply, params: Any, prompt
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Generate with every cache; return a row per cache, and all float characters."""
    shape = config.rows, config.length
    rows, text, reference = [], None, None
    for name, specs in CACHES.items():
        caches = make_caches(size, shape, *specs)
        run = functools.partial(
            generate,
            apply,
            params,
            jnp.tile(prompt[None], (config.rows, 1)),
            caches,
            jax.random.key(config.seed),
            num_tokens=config.num_tokens,
            temperature=config.temperature,
        )
        tokens = np.asarray(run()[0])
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        if text is None:
            text = np.concatenate([np.tile(prompt, (config.rows, 1)), tokens], axis=1)
        logits, full = replay(apply, params, text, caches)
        logits = np.asarray(logits)
        reference = logits if reference is None else reference
        alone = jax.tree.map(lambda x: x[:1], full)
        bound = np.asarray(logit_bound(apply, params, text[:1], alone))
        error = np.abs(logits - reference)
        numbers = sum(2 * int(np.prod(c.shape)) for c in caches)
        rows.append(
            {
                "cache": name,
                "bytes": sum(c.nbytes for c in caches),
                "bits_per_number": 8 * sum(c.nbytes for c in caches) / numbers,
                "logit_error": float(error.max()),
                "last_logit_error": float(error[0, -1].max()),
                "last_logit_bound": float(bound.max()),
                "is_within_bound": bool((error[0, -1] <= bound + 1e-4).all()),
                "same_characters": float((tokens == text[:, len(prompt) :]).mean()),
                "tokens_per_second": tokens.size / seconds,
            }
        )
    return rows, text


def make_table(rows: list[dict[str, Any]]) -> str:
    """Lay out the rows as Markdown."""
    heads = ["cache", "bytes", "of float32", "logits differ by", "at the last"]
    heads += ["bound there", "same characters", "characters/s"]
    cells = [
        [
            row["cache"],
            f"{row['bytes']:,}",
            f"{row['bytes'] / rows[0]['bytes']:.3f}",
            f"{row['logit_error']:.4f}",
            f"{row['last_logit_error']:.4f}",
            f"{row['last_logit_bound']:.4f}",
            f"{100 * row['same_characters']:.0f} %",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in rows
    ]
    return records.markdown(heads, cells)


def main(config: Config) -> None:
    """Train or restore, generate with every cache, and print."""
    data = (
        datasets.descriptions(length=config.length)
        if config.data_dir is None
        else datasets.load(config.data_dir, length=config.length)
    )
    if data.kind != "text":
        raise ValueError(
            f"data_dir must be a text, got the {data.kind} {data.name!r}; "
            "leave it out for a text that comes with scikit-learn"
        )
    prompt = encode(config.prompt, data.characters)
    total = len(prompt) + config.num_tokens
    if config.num_tokens < 2 or total > config.length or config.length % 16:
        raise ValueError(
            "num_tokens must be at least 2, and with the prompt at most the length, a "
            f"multiple of 16, got {len(prompt)} + {config.num_tokens} for a length of "
            f"{config.length}"
        )
    size = models.ModelConfig(
        "gpt", depth=config.depth, width=config.width, heads=config.heads
    )
    apply, params = trained(config, size, data)
    rows, text = measure(config, size, apply, params, prompt)
    for row in text:
        print("".join(data.characters[i] for i in row), end="\n---\n")
    print(make_table(rows))
    summary = {"settings": dataclasses.asdict(config), "rows": rows}
    records.write_json(config.out / "generate.json", summary)


if __name__ == "__main__":
    records.run(main, Config, __doc__)
