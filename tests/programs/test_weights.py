"""Leaves as matrices: they multiply what meets them, and go back where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.programs.counts import sites
from jopt.programs.handlers import Handler
from jopt.programs.interpret import rewrite
from jopt.programs.matrices import input_matrix
from jopt.programs.weights import (
    LayoutError,
    layered,
    layout,
    parts,
    shared_batch,
    weight_matrix,
)
from jopt.trees import paths
from tests.programs import zoo

# Sites whose leaves cannot be put back as matrices, and why.
LEFT = {
    "weight_norm": {"derived": "computed"},
    "lora": {"derived": "computed"},
    "shard_map_tp": {"up": "only as the program runs", "down": "only as the"},
}


def is_product(site):
    return site.kind in ("weight", "derived") and site.reachable


def matrices_met(model):
    """Per site: how far x w is from the result, and w of every layer."""

    def call(use):
        out, x, w = use.run(), input_matrix(use), weight_matrix(use.site, use.weight)
        y = jnp.einsum("bmk,bkn->bmn", x, w.astype(jnp.float32), precision="highest")
        if use.site.primitive.startswith("ragged"):
            y = jnp.sum(y, axis=0)  # rows of other groups are zero
        a, b = (jnp.sort(v.astype(jnp.float32), axis=None) for v in (y, out))
        far = jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-9)
        return out, {"far": far, "w": w}

    def initial(site):
        operand = site.in_shapes[site.operand]
        shape = jax.eval_shape(lambda w: weight_matrix(site, w), operand)
        return {"far": jnp.float32(0), "w": jnp.zeros(shape.shape, shape.dtype)}

    def merge(a, b):
        return {
            "far": jnp.maximum(a["far"], b["far"]),
            "w": jnp.where(jnp.any(b["w"] != 0), b["w"], a["w"]),
        }

    handler = Handler(call, is_product, initial, merge)
    return rewrite(model.apply, handler)(model.params, *model.inputs)[1]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_matrices_of_leaves_are_what_multiplies_at_every_site_of_the_zoo(name):
    model = zoo.ZOO[name]()
    table = sites(model.apply, model.params, *model.inputs)
    leaves = paths.leaves_with_path(model.params)
    tolerance = 2e-2 if name in ("gqa", "scaled") else 1e-5  # bfloat16 in these
    met = matrices_met(model)
    assert met
    left = {}
    for site in filter(is_product, table):
        assert jnp.max(met[site.name]["far"]) <= tolerance
        if not parts(site):
            left[site.name] = "computed before"
        for part in parts(site):
            leaf = leaves[part.view.leaf][1]
            try:
                found = layout(site, leaf.shape, view=part.view)
            except LayoutError as error:
                left[site.name] = str(error)
                continue
            w = part_of_matrices(site, part, met[site.name]["w"])
            lead = layered(site, part.view, leaf.shape)
            if not any(jnp.ravel(w)):  # of a branch that was not taken
                continue
            assert w.ndim == len(lead) + 3
            for axis in reversed([i for i, own in enumerate(lead) if not own]):
                w = w.take(0, axis)  # every device or layer has the same
            matrices = found.to_matrices(leaf)
            assert matrices.shape == found.sizes
            w = w.reshape(found.sizes[0], -1, *found.sizes[2:]).astype(jnp.float32)
            is_same = [shared_batch(site, each, part.view) for each in w]
            times = w.shape[1] // found.sizes[1]
            assert_proportional(jnp.stack(is_same) / times, matrices, tolerance)
            # There and back again, exactly, and nothing else is touched.
            again = found.from_matrices(matrices, jnp.full_like(leaf, jnp.nan))
            covered = ~np.isnan(np.asarray(again, np.float32))
            assert covered.sum() == np.prod(found.sizes)
            assert covered.all() == found.is_whole
            np.testing.assert_array_equal(np.asarray(again)[covered], leaf[covered])
    expected = LEFT.get(name, {})
    assert len(left) == len(expected), left
    for (site, reason), (stem, why) in zip(
        sorted(left.items()), sorted(expected.items()), strict=True
    ):
        assert site.startswith(stem)
        assert why in reason


def part_of_matrices(site, part, w):
    """Cut a joined leaf out of its operand's matrices, along their outputs."""
    if part.axis is None:
        return w
    return w[..., part.start : part.start + part.size]


def assert_proportional(found, expected, tolerance):
    """Equal up to a factor: scaled weights are views too."""
    found, expected = (np.asarray(v, np.float32) for v in (found, expected))
    factor = (found * expected).sum() / (expected * expected).sum()
    np.testing.assert_allclose(
        found / factor, expected, atol=tolerance * np.abs(expected).max()
    )
