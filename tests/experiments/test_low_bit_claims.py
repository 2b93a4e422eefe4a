"""Claims about few bits, in small: they go on where they were, and tell what they
found."""

import json

import numpy as np
import pytest

from experiments.claims import low_bit_resnet, post_training


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "text.txt"
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    file.write_text(" ".join(rng.choice(words, 2000)))
    return file


@pytest.mark.exhaustive
def test_post_training_takes_a_dense_model_and_adds_what_is_missing(
    tmp_path, text, capsys
):
    def go(folder, **options):
        sizes = {"width": 16, "depth": 1, "length": 16, "batch_size": 8, "steps": 4}
        post_training.main(
            post_training.Config(
                out=tmp_path / folder,
                data_dir=text,
                calibration_batches=2,
                groups=(8,),
                **sizes,
                **options,
            )
        )

    go("out", bits=(8,), methods=("rtn",))
    made = tmp_path / "out" / "runs" / "rtn_8_8" / "result.json"
    before = made.stat().st_mtime_ns
    go("out", bits=(8, 3))
    assert made.stat().st_mtime_ns == before
    summary = json.loads((tmp_path / "out" / "post_training.json").read_text())
    results = {(r["method"], r["bits"]): r for r in summary["results"]}
    assert len(results) == 1 + 2 * len(post_training.METHODS)
    assert results["gptq", 3]["bits_per_weight"] == 3 + (16 + 8) / 8
    assert results["rtn", 8]["loss"] == pytest.approx(
        results["dense", 32]["loss"], rel=1e-2
    )
    capsys.readouterr()
    go("out", bits=(8, 3), summarize=True)
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "post_training.md").read_text() == table
    assert table.count("\n|") == 4 + 6  # two tables
    assert [r["cache"] for r in summary["caches"]] == ["int8", "fp8_e4m3", "int4"]
    floats = results["dense", 32]["loss"]
    assert summary["caches"][0]["loss"] == pytest.approx(floats, rel=1e-3)
    go("other", bits=(8,), methods=("rtn",), dense=tmp_path / "out")
    other = json.loads((tmp_path / "other" / "post_training.json").read_text())
    assert other["results"][0]["loss"] == results["dense", 32]["loss"]
    go("signed", bits=(3,), methods=("rtn",), dense=tmp_path / "out", symmetric=True)
    signed = json.loads((tmp_path / "signed" / "post_training.json").read_text())
    assert signed["results"][1]["bits_per_weight"] == 3 + 16 / 8


@pytest.mark.exhaustive
def test_low_bit_resnet_has_a_row_for_every_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(low_bit_resnet, "WIDTHS", {"W4A8": (4, 8)})
    config = low_bit_resnet.Config(
        out=tmp_path, epochs=0.2, more_epochs=0.1, width=4, calibration_batches=2
    )
    low_bit_resnet.main(config)
    capsys.readouterr()
    low_bit_resnet.main(config)
    table = capsys.readouterr().out
    assert "step" not in table, "trained again"
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "float",
        "float, longer",
        *low_bit_resnet.METHODS.values(),
    ]
    assert (tmp_path / "low_bit_resnet.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "low_bit_resnet.json").read_text())["results"]
    assert all(0 <= r["accuracy"] <= 1 for r in found) and len(found) == 6
