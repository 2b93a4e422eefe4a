"""The claims on a tiny scale: killed, run again, counted, and looked at."""

import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from experiments import compress, records
from experiments.claims import one_shot, sparse_methods, sparse_training, ternary

STEPS = 4
IMAGES = 8 * STEPS


def sparse_config(folder, **options):
    defaults = {
        "epochs": 1.0,
        "train_images": IMAGES,
        "test_images": 40,
        "width": 8,
        "batch_size": 8,
        "methods": ("dense", "magnitude"),
        "sparsities": (0.9,),
        "save_every": 1,
    }
    return sparse_training.Config(out=folder, **(defaults | options))


def kill_when_it_says(monkeypatch, words):
    """Stop a job as Ctrl-C would, the first time it says so."""
    say, killed = records.say, []

    def listen(line):
        if words in line and not killed:
            killed.append(line)
            raise KeyboardInterrupt
        say(line)

    monkeypatch.setattr(records, "say", listen)


def copy_when_it_says(monkeypatch, words, folder, copy):
    """Copy what a kill would leave in a folder, the first time a job says so."""
    say = records.say

    def listen(line):
        if words in line and not copy.exists():
            shutil.copytree(folder, copy)
        say(line)

    monkeypatch.setattr(records, "say", listen)


def results_in(folder):
    return {
        f.parent.parent.name: f for f in sorted(folder.glob("runs/*/*/result.json"))
    }


def without_times(file):
    result = json.loads(file.read_text())
    return {k: v for k, v in result.items() if k not in ("seconds", "hardware")}


def test_sparse_training_killed_between_runs_and_within_one(
    tmp_path, monkeypatch, capsys
):
    # Jobs of one model evaluate by one program, compiled once.
    cached = functools.cache(compress.make_predict)
    monkeypatch.setattr(compress, "make_predict", cached)
    folder, within = tmp_path / "between", tmp_path / "within"
    copy_when_it_says(monkeypatch, "step 3 of 4", folder, within)
    kill_when_it_says(monkeypatch, "run 2 of 2")
    with pytest.raises(KeyboardInterrupt):
        sparse_training.main(sparse_config(folder))
    assert list(results_in(folder)) == ["dense_0"]
    made = results_in(folder)["dense_0"].stat().st_mtime_ns
    sparse_training.main(sparse_config(folder))
    files = results_in(folder)
    assert list(files) == ["dense_0", "magnitude_0.9"]
    assert files["dense_0"].stat().st_mtime_ns == made, "a finished run was done again"

    assert results_in(within) == {}
    capsys.readouterr()
    sparse_training.main(sparse_config(within, methods=("dense",)))
    assert "step 0 of 4" not in capsys.readouterr().out, "it began anew"
    again = results_in(within)["dense_0"]
    assert without_times(again) == without_times(files["dense_0"])

    check_zeros_are_counted(json.loads(files["magnitude_0.9"].read_text()))
    check_summary(folder, capsys)
    with pytest.raises(ValueError, match=r"other .*width"):
        sparse_training.main(sparse_config(folder, width=16))


def check_zeros_are_counted(result):
    sizes = [layer["size"] for layer in result["layers"].values()]
    zeros = [layer["zeros"] for layer in result["layers"].values()]
    assert len(sizes) == 10  # stem, 6 in blocks, 2 shortcuts, head
    assert zeros == [round(0.9 * size) for size in sizes]
    assert result["zeros"] == sum(zeros)
    assert result["actual_sparsity"] == sum(zeros) / sum(sizes)


def check_summary(folder, capsys):
    capsys.readouterr()
    sparse_training.main(sparse_config(folder, summarize=True))
    table = capsys.readouterr().out
    summary = json.loads((folder / "sparse_training.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["dense", "magnitude"]
    assert summary["seeds"] == 1 and summary["train_images"] == IMAGES
    assert {"date", "cpu", "jax", "jopt"} <= summary["hardware"][0].keys()
    assert all(row["accuracy_std"] is None for row in summary["rows"])
    assert (folder / "sparse_training.md").read_text() == table
    assert table.splitlines()[0] == "| method | accuracy at 90 % | zeros |"
    assert table.splitlines()[3].startswith("| magnitude | ")
    picture = (folder / "sparse_training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_seeds_become_mean_and_deviation():
    def result(method, sparsity, seed, accuracy):
        return {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "accuracy": accuracy,
            "actual_sparsity": sparsity,
            "seconds": 1.0,
        }

    rows = sparse_training.rows_of(
        [
            result("dense", 0.0, 0, 0.9),
            result("rigl", 0.9, 0, 0.4),
            result("rigl", 0.9, 1, 0.6),
            result("set", 0.95, 0, 0.3),
        ]
    )
    assert sparse_training.make_table(rows).splitlines()[2:] == [
        "| dense | 90.0 | 0.00 % | 90.0 | 0.00 % |",
        "| SET | - | - | 30.0 | 95.00 % |",
        "| RigL | 50.0 ± 14.1 | 90.00 % | - | - |",
    ]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="methods must be among"):
        sparse_training.main(sparse_training.Config(methods=("magic",)))


@pytest.mark.parametrize("method", sparse_methods.METHODS)
def test_every_method_is_a_transformation_of_the_same_params(method):
    plan = sparse_methods.Plan(optax.adam(1e-3), 0.9, 100, jax.random.key(0))
    tx = sparse_methods.METHODS[method][1](plan)
    params = {"kernel": np.ones((8, 16), np.float32), "bias": np.ones(16, np.float32)}

    def step(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    shapes = jax.eval_shape(step, params)
    assert shapes["kernel"].shape == (8, 16) and shapes["bias"].shape == (16,)


def shot_config(folder, text, **options):
    return one_shot.Config(
        out=folder,
        data_dir=text,
        steps=STEPS,
        width=16,
        depth=1,
        length=16,
        batch_size=8,
        calibration_batches=4,
        save_every=1,
        **options,
    )


@pytest.mark.exhaustive
def test_one_shot_killed_in_training_and_between_methods(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    text.write_text(" ".join(rng.choice(words, 2000)))
    config = shot_config(folder, text)
    for words in ("step 3 of 4", "wanda 50 %"):
        kill_when_it_says(monkeypatch, words)
        with pytest.raises(KeyboardInterrupt):
            one_shot.main(config)
    files = sorted(folder.glob("runs/*/result.json"))
    assert [f.parent.name for f in files] == [
        "dense_0",
        "magnitude_50",
        "magnitude_per_output_50",
    ]
    made = [f.stat().st_mtime_ns for f in files]
    capsys.readouterr()
    one_shot.main(config)
    assert "step" not in capsys.readouterr().out, "the dense model was trained again"
    assert [f.stat().st_mtime_ns for f in files] == made
    one_shot.main(shot_config(folder, text, summarize=True))
    tables = capsys.readouterr().out
    assert (folder / "one_shot.md").read_text() == tables
    assert (folder / "one_shot.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "one_shot.json").read_text())
    assert [(r["method"], r["goal"]) for r in summary["results"]] == one_shot.work()
    assert len(one_shot.work()) == 8
    assert [r["actual_sparsity"] for r in summary["results"]] == [0.0] + 7 * [0.5]
    ratios = [row["ratio_held_out"] for row in summary["layers"]]
    assert len(ratios) == 4 and ratios == sorted(ratios, reverse=True)
    assert all(row["ratio_calibration"] < 1 for row in summary["layers"])


def test_reconstruction_error_is_that_of_the_outputs():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 6)), rng.normal(size=(6, 3))
    pruned = np.where(np.abs(w) > 0.5, w, 0)
    expected = np.sum((x @ w - x @ pruned) ** 2) / np.sum((x @ w) ** 2)
    found = one_shot.reconstruction_error(x.T @ x, w, pruned)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.exhaustive
def test_ternary_killed_between_models_and_within_one(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    text.write_text(" ".join(rng.choice(words, 2000)))

    def config(**options):
        return ternary.Config(
            out=folder,
            data_dir=text,
            steps=STEPS,
            width=16,
            depth=1,
            length=16,
            batch_size=8,
            save_every=1,
            **options,
        )

    for words in ("step 3 of 4", "ternary weights, int8"):
        kill_when_it_says(monkeypatch, words)
        with pytest.raises(KeyboardInterrupt):
            ternary.main(config())
    files = [ternary.record_of(folder, m) for m in ("float", "ternary_weights")]
    made = [f.stat().st_mtime_ns for f in files]
    ternary.main(config())
    assert [f.stat().st_mtime_ns for f in files] == made
    capsys.readouterr()
    ternary.main(config(summarize=True))
    assert (folder / "ternary.md").read_text() == capsys.readouterr().out
    assert (folder / "ternary.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "ternary.json").read_text())
    results = summary["results"]
    assert [r["method"] for r in results] == list(ternary.METHODS)
    sizes = [r["layer_bytes"] for r in results]
    assert sizes[1] == sizes[2] < sizes[0] / 15
    assert [r["levels"] for r in results[1:]] == [3, 3]
    ratio = results[2]["loss"] / results[0]["loss"] - 1
    assert summary["over_float"]["ternary"] == pytest.approx(ratio)
