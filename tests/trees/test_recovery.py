"""Checkpoints survive what they can and never give back wrong values."""

import collections
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jopt.trees import checkpoint, manifest, storage
from jopt.trees.checkpoint import restore, save, steps
from jopt.trees.manifest import CheckpointError

LARGE = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
TREE = {"large": jnp.asarray(LARGE), "w": jnp.arange(5.0), "step": 3}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Three steps, to be copied and damaged."""
    path = tmp_path_factory.mktemp("intact")
    for step in range(3):
        save(path, {**TREE, "step": step}, step=step)
    return path


@pytest.fixture
def damaged(intact, tmp_path):
    path = tmp_path / "ckpt"
    shutil.copytree(intact, path)
    return path


def flip(file, position=-9):
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def largest(directory):
    return max(directory.rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)


def test_falls_back_and_names_the_damage(damaged):
    file = largest(damaged / "2")
    flip(file)
    with pytest.warns(UserWarning, match=rf"restored step 1 .*step 2: .*{file.name}"):
        assert restore(damaged)["step"] == 1
    with pytest.raises(CheckpointError, match=f"step 2: .*{file.name} has changed"):
        restore(damaged, step=2)
    assert restore(damaged, step=1)["step"] == 1


def test_metadata_is_that_of_the_step_restored(tmp_path):
    for step in (1, 2):
        save(tmp_path, {**TREE, "x": step}, step=step, metadata={"at": step})
    flip(largest(tmp_path / "2"))
    with pytest.warns(UserWarning, match="restored step 1"):
        tree, metadata = restore(tmp_path, with_metadata=True)
    assert metadata == {"at": 1} and tree["x"] == 1


def test_wrong_steps_and_metadata_are_refused(tmp_path):
    for step in (True, 1.0, -1):
        with pytest.raises(ValueError, match="step must be an integer"):
            save(tmp_path, {"x": 1}, step=step)
    with pytest.raises(TypeError, match="metadata must be a dict of JSON"):
        save(tmp_path, {"x": 1}, metadata={"a": jnp.ones(1)})
    assert steps(tmp_path) == []


def test_fields_in_another_order_are_refused(tmp_path):
    first = collections.namedtuple("State", "mu nu")
    second = collections.namedtuple("State", "nu mu")
    save(tmp_path, first(jnp.ones(1), jnp.zeros(1)))
    with pytest.raises(ValueError, match="in the saved order"):
        restore(tmp_path, like=second(jnp.zeros(1), jnp.zeros(1)))


def test_all_damaged(damaged):
    flip(largest(damaged / "0"))
    largest(damaged / "1").unlink()
    (damaged / "2" / manifest.NAME).unlink()
    with pytest.raises(CheckpointError) as error:
        restore(damaged)
    message = str(error.value)
    assert "step 2: manifest.json.gz is missing; step 1: " in message
    assert "is missing; step 0: " in message


def test_a_damaged_step_can_be_saved_again(damaged):
    flip(largest(damaged / "2"))
    save(damaged, {"x": 5}, step=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(damaged) == {"x": 5}
    assert steps(damaged) == [0, 1, 2]
    # And again, once the replacement is damaged too.
    (damaged / "2.1" / manifest.NAME).write_bytes(b"garbage")
    save(damaged, {"x": 6}, step=2, max_to_keep=2)
    assert restore(damaged) == {"x": 6}
    assert steps(damaged) == [1, 2]


def test_strays_are_no_steps(damaged):
    (damaged / "9").mkdir()
    (damaged / "10" / "inside").mkdir(parents=True)
    (damaged / "11").write_text("file")
    (damaged / "03").mkdir()
    (damaged / "5.orbax-checkpoint-tmp").mkdir()
    (damaged / "4.deleted").mkdir()
    (damaged / "notes").mkdir()
    assert steps(damaged) == [0, 1, 2]
    assert restore(damaged)["step"] == 2
    save(damaged, TREE, step=3)
    names = {entry.name for entry in damaged.iterdir()}
    assert names == {"0", "1", "2", "3", "9", "10", "11", "03", "notes"}


def test_values_that_pass_the_files_are_checked_too(damaged, monkeypatch):
    read = checkpoint._read

    def corrupt(directory, requests):
        arrays = read(directory, requests)
        if directory.name == "2":
            arrays[storage.SMALL][3] ^= 1
        return arrays

    monkeypatch.setattr(checkpoint, "_read", corrupt)
    with pytest.warns(UserWarning, match="leaf 'w' has other values than were saved"):
        assert restore(damaged)["step"] == 1


def test_template_errors_do_not_fall_back(damaged):
    with pytest.raises(ValueError, match="lacks"):
        restore(damaged, like={"w": jnp.ones(5)})


@pytest.mark.parametrize("seed", range(40))
def test_one_random_damage_to_the_only_step(intact, tmp_path, seed):
    rng = random.Random(seed)
    shutil.copytree(intact / "2", tmp_path / "2")
    file = rng.choice(sorted(f for f in tmp_path.rglob("*") if f.is_file()))
    data = bytearray(file.read_bytes())
    match seed % 3:
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        case 1:
            file.write_bytes(data[: rng.randrange(len(data))])
        case 2:
            file.unlink()
    try:
        found = restore(tmp_path)
    except CheckpointError as error:
        assert file.name in str(error)
    else:
        assert found["step"] == 2
        assert np.array_equal(found["large"], LARGE)
        assert np.array_equal(found["w"], TREE["w"])


def test_quiet_and_without_threads(tmp_path, capfd):
    before = threading.active_count()
    for step in range(3):
        save(tmp_path, TREE, step=step)
        restore(tmp_path)
    for _ in range(100):  # on a busy machine threads take a while to end
        if threading.active_count() <= before:
            break
        time.sleep(0.1)
    assert threading.active_count() <= before
    assert capfd.readouterr() == ("", "")


WRITER = """
import sys, jax.numpy as jnp
from jopt.trees import checkpoint
for step in range(10**6):
    tree = {"w": jnp.full((400, 300), step), "step": step}
    checkpoint.save(sys.argv[1], tree, step=step, max_to_keep=2)
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path):
    root = pathlib.Path(checkpoint.__file__).parents[2]
    last = -1
    for moment in range(4):
        path = tmp_path / str(moment)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, path],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        ) as process:
            for _ in range(2 + moment):
                last = int(process.stdout.readline())
            time.sleep(0.013 * moment)
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        last = int(rest[-1]) if rest else last
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = restore(path)
        assert found["step"] >= last
        assert np.all(np.asarray(found["w"]) == found["step"])
        save(path, {"step": -1}, step=found["step"] + 1)
        assert restore(path) == {"step": -1}
        assert all(entry.name.isdigit() for entry in path.iterdir())
