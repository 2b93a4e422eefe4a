"""Leaves as matrices: they multiply what meets them, and go back where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

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


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


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


def met_and_read(apply, params, *inputs):
    """Per site: the matrices that multiplied, and those of the layout."""
    model = zoo.Model(apply, params, inputs, {})
    found = {}
    for name, met in matrices_met(model).items():
        assert jnp.max(met["far"]) < 1e-5
        site = sites(apply, params, *inputs)[name]
        leaf = params[site.path]
        place = layout(site, leaf.shape)
        found[name] = met["w"].reshape(place.sizes), place.to_matrices(leaf)
    return found


def test_slices_reversals_and_nested_loops_are_undone():
    def apply(params, x):
        def outer(x, one):
            x, _ = lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, one, reverse=True)
            return x, None

        # Axes 2 and 0 stack layers, in this order, from the second on.
        nested = jnp.transpose(params["nested"][1:], (2, 0, 3, 1))
        x, _ = lax.scan(outer, x, nested)
        x = params["w"][1:9:2, ::-1] @ x
        back = lax.rev(params["w"].reshape(4, 3, 4), (0, 2))[:, 1].T
        return x, back @ x

    params = {"nested": draw(3, 4, 2, 4), "w": draw(12, 4)}
    found = met_and_read(apply, params, draw(4, 5))
    assert found["nested"][0].shape == (4, 1, 4, 4)
    assert len(found) == 3
    for met, read in found.values():
        np.testing.assert_array_equal(met, read)


def test_grouped_dilated_and_transposed_convolutions():
    def apply(params, x):
        def conv(x, w, **kwargs):
            return lax.conv_general_dilated(x, w, **kwargs)

        images = conv(
            x,
            params["images"],
            window_strides=(1,),
            padding="SAME",
            batch_group_count=2,
        )
        features = conv(
            x,
            params["features"],
            window_strides=(2,),
            padding=[(1, 2)],
            rhs_dilation=(2,),
            feature_group_count=2,
        )
        back = conv(
            features,
            lax.rev(params["back"], (2,)),
            window_strides=(1,),
            padding=[(2, 2)],
            lhs_dilation=(2,),
        )
        return images, back

    shapes = {"images": (6, 4, 3), "features": (8, 2, 3), "back": (5, 8, 3)}
    params = {name: draw(*shape) for name, shape in shapes.items()}
    found = met_and_read(apply, params, draw(4, 4, 9))
    assert found["images"][0].shape == (1, 2, 12, 3)
    assert found["features"][0].shape == (1, 2, 6, 4)
    for name, (met, read) in found.items():
        np.testing.assert_array_equal(met, read, err_msg=name)
        assert name in params


def test_what_cannot_be_undone_says_why():
    def apply(params, x):
        gaps = params["gaps"].reshape(4, 3, 4)[:, :2].reshape(8, 4)
        x = gaps @ x
        repeated = jnp.broadcast_to(params["row"][None], (6, 8))
        return repeated @ x, lax.dynamic_slice(params["part"], (n(x), 0), (2, 8)) @ x

    def n(x):
        return jnp.argmax(x[:3, 0])

    params = {"gaps": draw(12, 4), "row": draw(8), "part": draw(5, 8)}
    table = sites(apply, params, draw(4, 2))
    for name, match in (("gaps", "gaps"), ("row", "repeated"), ("part", "only as")):
        with pytest.raises(LayoutError, match=match):
            layout(table[name], params[name].shape)
