"""The main job end to end on a small scale: killed, resumed, looked at."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jopt
from experiments import compress
from experiments.variants import VARIANTS

ROOT = Path(__file__).parent.parent.parent
ALL = [variant.name for variant in VARIANTS]
# What is left out combines what these show.
FEWER = [name for name in ALL if name not in ("sparse90", "int8", "w8a8_trained")]


def start(folder, *options):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.compress", "--out", str(folder)]
    command += ["--steps", "12", "--seeds", "1", "--width", "8", "--save-every", "4"]
    return subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("names", "connections"),
    [(FEWER, "plain"), pytest.param(ALL, "residual", marks=pytest.mark.exhaustive)],
    ids=["fewer", "all"],
)
def test_the_main_job(names, connections, tmp_path):
    """One run serves all checks: processes that test in parallel share no fixture."""
    folder = tmp_path / "compress"
    options = ["--variants", *names, "--connections", connections]
    run_killed_once(folder, options)
    check_every_variant_is_there_and_ships_what_it_says(folder, names)
    check_artefacts_are_compressed_arrays(folder, names)
    check_pictures_and_report_are_self_contained(folder)
    check_other_options_in_the_same_folder_are_refused(folder, options)


@pytest.mark.parametrize("names", [("int4",), ("dense", "int5"), ()])
def test_what_are_no_variants(names):
    with pytest.raises(ValueError, match="variants must be 'dense' and any of"):
        compress.chosen(names)


def run_killed_once(folder, options):
    """Kill the job once it has begun its second variant, then finish it."""
    process = start(folder, *options)
    first = folder / "runs" / "dense" / "seed_0" / "result.json"
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "report.html").exists()
    made = first.stat().st_mtime_ns
    process = start(folder, *options)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert first.stat().st_mtime_ns == made, "a finished run was done again"


def check_every_variant_is_there_and_ships_what_it_says(folder, names):
    rows = {
        row["name"]: row
        for row in json.loads((folder / "results.json").read_text())["rows"]
    }
    assert list(rows) == names
    dense = rows["dense"]
    shares = {"int8": 0.45, "w8a8": 0.45, "int4": 0.3, "sparse90": 0.35}
    for name, share in shares.items():
        assert name not in names or rows[name]["bytes"] < share * dense["bytes"]
    assert rows["student"]["num_params"] < 0.3 * dense["num_params"]
    for row in rows.values():
        on_disk = sum(
            file.stat().st_size
            for file in (folder / "runs" / row["name"] / "seed_0" / "artefact").rglob(
                "*"
            )
            if file.is_file()
        )
        assert row["bytes"] == on_disk


def check_artefacts_are_compressed_arrays(folder, names):
    shipped = {
        name: jopt.restore(folder / "runs" / name / "seed_0" / "artefact")
        for name in names
    }
    assert isinstance(shipped["int4"]["head"]["kernel"], jopt.QuantizedArray)
    both = jopt.dequantize(shipped["sparse80_int8"])
    kernels = [np.asarray(x) for x in jax.tree.leaves(both) if x.ndim > 1]
    size = sum(x.size for x in kernels)
    assert sum(int((x == 0).sum()) for x in kernels) >= round(0.8 * size)
    if "sparse90" in names:
        kernels = [np.asarray(x) for x in jax.tree.leaves(shipped["sparse90"])]
        zeros = sum(int((x == 0).sum()) for x in kernels if x.ndim > 1)
        assert zeros == round(0.9 * size)
    kernel = np.asarray(shipped["sparse24"]["blocks"]["1"]["conv1"]["kernel"])
    groups = kernel.reshape(3, 3, -1, 4, kernel.shape[-1])
    assert int((groups != 0).sum(axis=3).max()) <= 2


def check_pictures_and_report_are_self_contained(folder):
    for name in ("accuracy_bytes.png", "sparsity.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page and "https://" not in page


def check_other_options_in_the_same_folder_are_refused(folder, options):
    process = start(folder, *options, "--learning-rate", "0.1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "other learning_rate" in output and "Traceback" not in output
