"""Reports count exact zeros and real bytes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jopt.arrays import formats, packing, quantized
from jopt.trees.report import report

NAN = float("nan")


def sparsity(leaf):
    return report({"x": leaf}).rows[0].sparsity


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_only_exact_zeros_count(dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    values = np.array([0.0, -0.0, float(tiny), -float(tiny), NAN, jnp.inf], dtype)
    assert sparsity(jnp.asarray(values)) == pytest.approx(2 / 6)
    assert sparsity(values) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    "dtype", ["bool", "int4", "uint8", "int32", "float8_e4m3fn", "float4_e2m1fn"]
)
def test_zeros_of_other_dtypes(dtype):
    assert sparsity(jnp.array([0, 1, 1, 0]).astype(dtype)) == 0.5


def test_shapes_without_elements_or_axes():
    assert sparsity(jnp.zeros((0, 3))) == 0.0
    assert sparsity(jnp.float32(0)) == 1.0
    assert report({}).total.nbytes == 0
    assert "total" in str(report({}))


def test_counts_of_sharded_leaves(auto_mesh, explicit_mesh):
    for mesh in (auto_mesh, explicit_mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
        values = jax.device_put(jnp.arange(64.0).reshape(16, 4) % 4, sharding)
        assert sparsity(values) == 0.25


def test_figures_and_total():
    tree = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]]),
        "bias": jnp.ones(4, jnp.bfloat16),
        "key": jax.random.key(0),
        "rate": 0.1,
    }
    found = report(tree)
    assert [row.path for row in found.rows] == ["bias", "kernel", "key"]
    assert [row.nbytes for row in found.rows] == [8, 16, 8]
    assert [row.bits for row in found.rows] == [16.0, 32.0, 64.0]
    assert found.total.size == 9
    assert found.total.sparsity == pytest.approx(3 / 8)
    assert found.total.nbytes == 32


def test_masks_packed_or_not():
    tree = {"a": jnp.ones((2, 8)), "b": jnp.ones(3), "c": jnp.ones(4)}
    mask = jnp.arange(16).reshape(2, 8) < 4
    masks = {
        "a": packing.pack_mask(mask),
        "b": optax.MaskedNode(),
        "c": jnp.array([True, False, False, False]),
    }
    found = report(tree, masks=masks)
    assert [row.masked for row in found.rows] == [0.75, None, 0.75]
    assert found.total.masked == 0.75
    assert "masked" in str(found)
    assert "masked" not in str(report(tree))
    with pytest.raises(ValueError, match="masks must be a tree like"):
        report(tree, masks={"a": mask})


def test_abstract_leaves_have_no_sparsity():
    found = report(jax.eval_shape(lambda: {"w": jnp.ones((2, 3))}))
    assert found.rows[0].sparsity is None
    assert found.rows[0].nbytes == 24
    assert "-" in str(found).splitlines()[2]


def test_quantized_leaves():
    w = jnp.where(jnp.arange(4096).reshape(64, 64) % 4 == 0, jnp.pi, 0.0)
    spec = quantized.QuantSpec(formats.int4, group_size=32)
    tree = {"w": quantized.quantize_array(w, spec)}
    (row,) = report(tree).rows
    assert (row.path, row.shape, row.dtype) == ("w", (64, 64), "int4")
    assert (row.bits, row.nbytes, row.sparsity) == (4.5, 64 * 64 * 4.5 / 8, 0.75)
    abstract = jax.eval_shape(lambda: tree)
    (row,) = report(abstract).rows
    assert (row.bits, row.sparsity) == (4.5, None)


def test_traced_leaves_raise():
    with pytest.raises(ValueError, match="tracer at 'w'"):
        jax.jit(report)({"w": jnp.ones(2)})


def test_table_is_aligned_and_shows_every_path():
    tree = {"[red]w": jnp.ones((20, 300)), "b" * 90: jnp.zeros(1)}
    lines = str(report(tree)).splitlines()
    assert len({len(line) for line in (lines[0], *lines[2:4], lines[-1])}) == 1
    assert "[red]w" in str(report(tree))
    assert "b" * 90 in str(report(tree))


def test_nnx_state_and_json():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    dicts = json.loads(json.dumps(report(state).to_dicts()))
    assert [row["path"] for row in dicts] == ["bias", "kernel", "total"]
    assert dicts[0]["sparsity"] == 1.0


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="masks must fit 'w'"):
        report({"w": jnp.ones((4, 8))}, masks={"w": jnp.ones((3, 3), bool)})
