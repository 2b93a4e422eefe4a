"""Real data as arrays, and batches as a function of (seed, step).

    digits   1,797 images of 8 x 8 inside scikit-learn: the default, no download. One
             fifth of each class is the test set, the same fifth always.
    images   a folder in the Hugging Face parquet layout: train-*.parquet and
             test-*.parquet with columns `img` or `image` (encoded files) and `label`
    text     a UTF-8 file, or a folder with one *.txt, by character: the first 90 %
             train, the rest tests

A batch depends on the seed and the step alone, so the state of the iterator is two
numbers, and a resumed run sees what an uninterrupted one would have seen.
"""

import dataclasses
import functools
import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_wine,
)
from sklearn.model_selection import train_test_split

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples in memory."""

    name: str
    kind: Literal["images", "text"]
    train: Batch  # images: x [n, h, w, c] float32, y [n] int32; text: x [n] int32
    test: Batch
    num_classes: int  # classes or distinct characters
    length: int = 0  # text: characters per example
    characters: str = ""  # text: what each code stands for


def load(data_dir: Path | None = None, *, length: int = 64) -> Dataset:
    """Load a folder or file, or digits when there is none."""
    if data_dir is None:
        return digits()
    if not data_dir.exists():
        raise ValueError(
            f"data_dir must exist, got {str(data_dir)!r}; leave it out for digits"
        )
    if data_dir.is_dir() and any(data_dir.rglob("*train*.parquet")):
        return images(data_dir)
    files = [data_dir] if data_dir.is_file() else sorted(data_dir.glob("*.txt"))
    if len(files) != 1:
        raise ValueError(
            "data_dir must be a text file, or a folder with one *.txt or with "
            f"train-*.parquet and test-*.parquet, got {str(data_dir)!r}"
        )
    return text(files[0], length=length)


def digits() -> Dataset:
    """Return scikit-learn's digits, 80 % train, split once and stratified."""
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16.0).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y.astype(np.int32), test_size=0.2, random_state=0, stratify=y
    )
    return Dataset(
        "digits", "images", {"x": train_x, "y": train_y}, {"x": test_x, "y": test_y}, 10
    )


def images(folder: Path) -> Dataset:
    """Read an image folder and normalise by the training set's mean and deviation."""
    splits = {}
    for split in ("train", "test"):
        files = sorted(folder.rglob(f"*{split}*.parquet"))
        if not files:
            raise ValueError(
                f"data_dir must hold {split}-*.parquet, got {str(folder)!r} without"
            )
        splits[split] = [_read_images(file) for file in files]
    train, test = (
        {key: np.concatenate([part[key] for part in parts]) for key in ("x", "y")}
        for parts in splits.values()
    )
    mean = train["x"].mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    deviation = train["x"].std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    for part in (train, test):
        part["x"] = (part["x"] - mean) / deviation
    return Dataset(folder.name, "images", train, test, int(train["y"].max()) + 1)


def _read_images(file: Path) -> Batch:
    table = pyarrow.parquet.read_table(file)
    column = "img" if "img" in table.column_names else "image"
    pictures = [
        np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        for cell in table[column].to_pylist()
    ]
    return {
        "x": np.stack(pictures).astype(np.float32) / 255.0,
        "y": table["label"].to_numpy().astype(np.int32),
    }


def text(file: Path, *, length: int) -> Dataset:
    """Read a text as characters."""
    return _by_character(file.stem, file.read_text(encoding="utf-8"), length)


def descriptions(*, length: int) -> Dataset:
    """Return what scikit-learn says of its data sets: a small text, no download."""
    tables = (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)
    content = "\n".join(load().DESCR for load in tables)
    return _by_character("descriptions", content, length)


def _by_character(name: str, content: str, length: int) -> Dataset:
    characters = "".join(sorted(set(content)))
    codes = {c: i for i, c in enumerate(characters)}
    array = np.array([codes[c] for c in content], np.int32)
    cut = int(0.9 * len(array))
    train, test = {"x": array[:cut]}, {"x": array[cut:]}
    return Dataset(name, "text", train, test, len(characters), length, characters)


def batch_at(data: Dataset, *, seed: int, step: int, size: int) -> Batch:
    """Return the batch of one step: a shuffled pass over the examples per epoch.

    Text takes windows from anywhere instead, the next character being the label.
    """
    if data.kind == "text":
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(data.train["x"]) - data.length - 1, size)
        return _windows(data.train["x"], starts, data.length)
    n = len(data.train["x"])
    first = step * size
    parts = []
    for epoch in range(first // n, (first + size - 1) // n + 1):
        begin = max(first - epoch * n, 0)
        parts.append(_order(seed, epoch, n)[begin : min(first + size - epoch * n, n)])
    index = np.concatenate(parts)
    return {key: array[index] for key, array in data.train.items()}


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Shuffle an epoch; remembered, because a million indices take a while."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def test_batch(data: Dataset, *, most: int = 2000) -> Batch:
    """Return the whole test set; of a text, up to `most` windows side by side."""
    if data.kind == "images":
        return data.test
    count = min(most, (len(data.test["x"]) - 1) // data.length)
    return _windows(data.test["x"], np.arange(count) * data.length, data.length)


def _windows(array: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    index = starts[:, None] + np.arange(length)
    return {"x": array[index], "y": array[index + 1]}
