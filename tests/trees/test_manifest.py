"""No single changed byte, name, shape or dtype passes a checksum."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.trees import manifest

WORDS = np.arange(64, dtype=np.float32).reshape(8, 8)


def checksum(array, path="w"):
    return manifest.leaf_checksum(path, array.dtype.name, array.shape, array)


def test_checksum_covers_path_shape_dtype_and_order():
    seen = [
        checksum(WORDS),
        checksum(WORDS, "v"),
        checksum(WORDS.reshape(4, 16)),
        checksum(WORDS.view(np.int32)),
        checksum(WORDS.T),
        checksum(WORDS[:7]),
    ]
    assert len(set(seen)) == len(seen)
    assert checksum(np.asfortranarray(WORDS)) == checksum(WORDS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, WORDS.nbytes - 1), st.integers(1, 255))
def test_any_flipped_byte_changes_the_checksum(position, flip):
    changed = WORDS.copy()
    changed.reshape(-1).view(np.uint8)[position] ^= flip
    assert checksum(changed) != checksum(WORDS)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_unused_bits_do_not_count(dtype):
    clean = np.asarray(jnp.array([1, 0, 1]).astype(dtype))
    noisy = clean.copy()
    noisy.view(np.uint8)[:] |= 0xF0
    assert checksum(noisy) == checksum(clean)


def written(tmp_path, content=None):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").write_bytes(bytes(range(200)))
    manifest.write(tmp_path, content or {"tree": None})
    return manifest.read(tmp_path)


def test_write_lists_every_file(tmp_path):
    content = written(tmp_path)
    assert content["files"].keys() == {"d/data"}
    manifest.check_files(tmp_path, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "d/data is missing"),
        (lambda file: file.write_bytes(b""), "0 bytes instead of 200"),
        (lambda file: file.write_bytes(bytes(200)), "d/data has changed bytes"),
        (lambda file: (file.unlink(), file.mkdir()), "d/data cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    content = written(tmp_path)
    damage(tmp_path / "d" / "data")
    with pytest.raises(manifest.CheckpointError, match=message):
        manifest.check_files(tmp_path, content)


def test_every_damaged_byte_of_the_manifest_is_seen_or_harmless(tmp_path):
    content = written(tmp_path)
    file = tmp_path / manifest.NAME
    original = file.read_bytes()
    harmless = 0
    for position in range(len(original)):
        for flip in (1, 0x80):
            changed = bytearray(original)
            changed[position] ^= flip
            file.write_bytes(changed)
            try:
                assert manifest.read(tmp_path) == content
                harmless += 1
            except manifest.CheckpointError as error:
                assert manifest.NAME in str(error)
    # Time stamp, system and speed in the header say nothing about the content.
    assert harmless <= 2 * 8
    for size in range(len(original)):
        file.write_bytes(original[:size])
        with pytest.raises(manifest.CheckpointError):
            manifest.read(tmp_path)
    file.unlink()
    with pytest.raises(manifest.CheckpointError, match="is missing"):
        manifest.read(tmp_path)


def test_a_later_version_is_refused(tmp_path):
    file = tmp_path / manifest.NAME
    file.write_bytes(gzip.compress(json.dumps({"version": 99}).encode()))
    with pytest.raises(ValueError, match=r"got version 99.*update jopt"):
        manifest.read(tmp_path)
