"""Data as a function of the step; models as pure functions."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from experiments import data, models

DIGITS = data.digits()


def test_digits_are_split_once_and_stratified():
    assert len(DIGITS.train["x"]) == 1437 and len(DIGITS.test["x"]) == 360
    counts = np.bincount(DIGITS.test["y"])
    assert counts.min() >= 34 and counts.max() <= 38


def test_an_epoch_sees_every_example_once():
    size = 100
    batches = [
        data.batch_at(DIGITS, seed=3, step=i, size=size)["x"].reshape(size, -1)
        for i in range(15)
    ]
    seen = np.concatenate(batches)[:1437]
    key = lambda x: sorted(map(bytes, x))  # noqa: E731
    assert key(seen) == key(DIGITS.train["x"].reshape(1437, -1))


def test_batches_depend_on_seed_and_step_alone():
    one = data.batch_at(DIGITS, seed=0, step=22, size=64)
    two = data.batch_at(DIGITS, seed=0, step=22, size=64)
    np.testing.assert_array_equal(one["x"], two["x"])
    other = data.batch_at(DIGITS, seed=1, step=22, size=64)
    assert not np.array_equal(one["x"], other["x"])


@pytest.fixture
def image_folder(tmp_path):
    """Write the Hugging Face layout: encoded files in a struct, a label."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        rows = []
        for _ in range(count):
            buffer = io.BytesIO()
            picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(buffer, format="PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"img": rows, "label": list(range(count))})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_image_folder(image_folder):
    loaded = data.load(image_folder)
    assert loaded.train["x"].shape == (12, 8, 8, 3) and loaded.num_classes == 12
    np.testing.assert_allclose(loaded.train["x"].mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(loaded.train["x"].std((0, 1, 2)), 1, atol=1e-4)


def test_text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("abcd" * 500)
    loaded = data.load(tmp_path, length=16)
    batch = data.batch_at(loaded, seed=0, step=0, size=4)
    np.testing.assert_array_equal(batch["x"][:, 1:], batch["y"][:, :-1])
    assert loaded.num_classes == 4
    assert len(data.test_batch(loaded)["x"]) == 12


def test_wrong_folders_raise(tmp_path):
    with pytest.raises(ValueError, match="data_dir must be a text file"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="data_dir must exist"):
        data.load(tmp_path / "absent")


@pytest.mark.parametrize("connections", ["plain", "residual", "dense"])
@pytest.mark.parametrize("depth", [1, 2])
def test_resnet(connections, depth):
    config = models.ModelConfig(width=8, depth=depth, connections=connections)
    apply, params = models.build(config, DIGITS, seed=0)
    logits = jax.eval_shape(apply, params, jnp.ones((3, 8, 8, 1)))
    assert logits.shape == (3, 10)
    deeper = models.build(
        models.ModelConfig(width=8, depth=depth + 1, connections=connections),
        DIGITS,
        seed=0,
    )[1]
    assert models.num_params(deeper) > models.num_params(params)


def test_gpt_is_causal(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("the quick brown fox " * 100)
    text = data.load(file, length=16)
    config = models.ModelConfig("gpt", depth=1, width=16, heads=2)
    apply, params = models.build(config, text, seed=0)
    x = data.test_batch(text, most=2)["x"]
    changed = x.copy()
    changed[:, 10] = (changed[:, 10] + 1) % text.num_classes
    a, b = jax.jit(apply)(params, x), jax.jit(apply)(params, changed)
    np.testing.assert_allclose(a[:, :10], b[:, :10], atol=1e-5)
    assert not np.allclose(a[:, 10:], b[:, 10:])


def test_students_have_about_a_quarter_of_the_parameters():
    config = models.ModelConfig(width=16)
    teacher = models.build(config, DIGITS, seed=0)[1]
    student = models.build(models.student_of(config), DIGITS, seed=0)[1]
    assert 0.2 < models.num_params(student) / models.num_params(teacher) < 0.3


def test_models_refuse_data_of_the_other_kind():
    with pytest.raises(ValueError, match="needs a text"):
        models.build(models.ModelConfig("gpt"), DIGITS, seed=0)
