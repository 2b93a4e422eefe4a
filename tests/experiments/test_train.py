"""The loop: three ways of data parallelism agree, and a resumed run keeps its bits."""

import functools

import jax
import numpy as np
import optax
import pytest

import jopt
from experiments import data, train
from tests import contract

DIGITS = data.digits()


def make_params():
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": 0.1 * rng.normal(size=(64, 32)), "bias": np.zeros(32)},
        "head": {"kernel": 0.1 * rng.normal(size=(32, 10))},
    }
    return jax.device_put(jax.tree.map(np.float32, params))


def loss(params, batch, extras):
    x = batch["x"].reshape(len(batch["x"]), -1)
    hidden = jax.nn.relu(
        x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    )
    logits = hidden @ params["head"]["kernel"]
    value = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return value.mean(), {"loss": value.mean()}


RAMP = jopt.schedules.cubic_sparsity(0.0, 0.5, end_step=8)
TX = jopt.prune(optax.adamw(1e-2), sparsity=RAMP, every_steps=4, end_step=8)


@functools.cache
def make_trainer(parallel):
    return train.make_trainer(loss, TX, parallel=parallel)


def run(folder, *, steps, parallel="jit", save_every=100):
    return train.fit(
        make_trainer(parallel),
        TX,
        make_params(),
        lambda step: data.batch_at(DIGITS, seed=0, step=step, size=64),
        train.TrainConfig(steps, 64, parallel, log_every=1, save_every=save_every),
        directory=folder,
    )


def test_jit_shard_map_and_pmap_agree_on_eight_devices(tmp_path):
    assert jax.device_count() == 8
    results = {
        parallel: run(tmp_path / parallel, steps=10, parallel=parallel).params
        for parallel in ("jit", "shard_map", "pmap")
    }
    for other in ("shard_map", "pmap"):
        for a, b in zip(
            jax.tree.leaves(results["jit"]),
            jax.tree.leaves(results[other]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert np.sum(np.asarray(results["jit"]["hidden"]["kernel"]) == 0) == 1024


def test_a_resumed_run_keeps_its_bits_and_its_metrics(tmp_path):
    whole = run(tmp_path / "whole", steps=12)
    run(tmp_path / "parts", steps=7, save_every=5)
    # What a kill leaves: rows past the checkpoint, the last cut short.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    parts = run(tmp_path / "parts", steps=12, save_every=5)
    contract.assert_same(parts.params, whole.params)
    contract.assert_same(parts.state, whole.state)
    rows = [
        train.read_metrics(tmp_path / k / "metrics.jsonl") for k in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 13))
    assert rows[0][-1]["loss"] < rows[0][0]["loss"]


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="parallel must be"):
        train.make_trainer(loss, TX, parallel="threads")


def test_batches_must_divide_over_the_devices(tmp_path):
    with pytest.raises(ValueError, match="multiple of the 8 devices"):
        train.fit(
            make_trainer("jit"),
            TX,
            make_params(),
            lambda step: data.batch_at(DIGITS, seed=0, step=step, size=60),
            train.TrainConfig(2, 60),
            directory=tmp_path,
        )
