"""Every site of every model of the zoo, against what was written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jopt.programs import views
from jopt.programs.counts import sites
from tests.programs import zoo


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_site_is_found_and_nothing_else(name):
    model = zoo.ZOO[name]()
    table = sites(model.apply, model.params, *model.inputs)
    found = {s.name: (s.primitive, s.roles) for s in table if s.is_weight}
    assert found == model.weights
    assert len(table.activations) == model.num_activations
    derived = [frozenset(table[name].leaf_paths) for name in table.derived]
    assert sorted(map(sorted, derived)) == sorted(map(sorted, model.derived))
    fed = {path for site in table for path in site.leaf_paths}
    assert set(table.leaves) - fed == model.uncovered
    not_entered = {site.path for site in table if not site.reachable}
    assert not_entered == model.opaque
    assert set(table.names) == {n for n in found if table[n].path not in model.opaque}
    # Every leaf is either named by a site or listed with a reason.
    named = {path for site in table if site.reachable for path in site.roles_by_path}
    assert {table[name].path for name in table.names} <= named
    assert named | set(table.uncovered) == set(table.leaves)
    assert not named & set(table.uncovered)
    assert all(table.uncovered.values())
    text = str(table)
    assert all(site.name in text for site in table)


def test_flops_of_a_scan_count_every_step():
    params = {"w": jnp.ones((5, 8, 8)), "head": jnp.ones((8, 3))}

    def apply(params, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])
        return x @ params["head"]

    table = sites(apply, params, jnp.ones((4, 8)))
    assert table["w"].runs == 5
    assert table["w"].flops == 5 * 2 * 4 * 8 * 8
    assert table["w"].bytes == 5 * 4 * (4 * 8 + 8 * 8 + 4 * 8)
    assert table.flops == table["w"].flops + 2 * 4 * 8 * 3
    # XLA counts the body of a scan once.
    cost = jax.jit(apply).lower(params, jnp.ones((4, 8))).compile().cost_analysis()
    assert cost["flops"] < table.flops


@pytest.mark.parametrize(
    "window, strides, groups", [((3, 3), (1, 1), 1), ((2, 3), (2, 1), 2)]
)
def test_flops_of_a_convolution_are_those_of_its_products(window, strides, groups):
    x, w = np.ones((2, 7, 6, 4)), np.ones((*window, 4 // groups, 8))

    def apply(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    table = sites(apply, jnp.asarray(w), jnp.asarray(x))
    # With ones everywhere an output is the number of its products.
    products = np.asarray(apply(jnp.asarray(w), jnp.asarray(x))).sum()
    assert table.flops == 2 * products


def test_branches_count_as_the_dearest_and_a_lookup_as_its_rows():
    params = {
        "big": jnp.ones((8, 8)),
        "small": jnp.ones((8, 1)),
        "table": jnp.ones((100, 8)),
    }

    def apply(params, tokens, flag):
        x = params["table"][tokens]
        return lax.cond(
            flag, lambda x: x @ params["big"], lambda x: x @ params["small"] + x, x
        )

    table = sites(apply, params, jnp.arange(3), True)
    assert table.flops == 2 * 3 * 8 * 8
    assert table["table"].bytes == 2 * 3 * 8 * 4 + 3 * 4
    assert table["big"].guards == ("branch 1",)


def test_sites_in_a_loop_carry_their_length_and_their_modules():
    model = zoo.ZOO["linen_transformer"]()
    table = sites(model.apply, model.params, *model.inputs)
    kernel = next(site for site in table if site.name.endswith("query/kernel"))
    assert [a.kind for a in kernel.around] == ["layers"]
    assert kernel.runs == kernel.around[0].size > 1
    assert any("query" in site.stack for site in table)


def test_what_is_not_a_site_says_why():
    params = {name: jnp.ones((3, 3)) for name in ("used", "added", "unused", "kernel")}
    params["penalty"] = jnp.ones(())

    def solve(matvec, b):
        return lax.custom_linear_solve(matvec, b, lambda _, b: b, symmetric=True)

    def apply(params, x):
        x = x @ params["used"] + params["added"]
        return solve(lambda v: params["kernel"] @ v, x), params["penalty"]

    reasons = sites(apply, params, jnp.ones((3, 3))).uncovered
    assert reasons == {
        "added": "used by add",
        "unused": "never used",
        "kernel": "used by custom_linear_solve (opaque)",
        "penalty": "used by the result",
    }


def test_a_constant_weight_is_listed_and_not_called_a_parameter():
    frozen = np.ones((3, 4), np.float32)
    table = sites(lambda p, x: (x @ p) @ frozen, jnp.ones((3, 3)), jnp.ones((2, 3)))
    assert [site.kind for site in table] == ["weight", "constant"]
    assert table.names == ("",)


def test_shapes_will_do_and_nothing_is_computed():
    shape = jax.ShapeDtypeStruct((10**5, 10**5), jnp.bfloat16)  # 20 GB
    x = jax.ShapeDtypeStruct((2, 10**5), jnp.bfloat16)
    table = sites(lambda p, x: x @ p["w"], {"w": shape}, x)
    assert table.names == ("w",) and table.flops == 4 * 10**10


def test_params_without_leaves_raise():
    with pytest.raises(ValueError, match="at least one leaf"):
        sites(lambda p, x: x, {}, 1.0)


def test_an_unknown_site_names_those_there_are():
    table = sites(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    with pytest.raises(KeyError, match="'w'"):
        table["v"]


def test_views_split_and_merge_and_know_where_they_are():
    view = views.whole(0, (6, 4))
    split = views.reshape(view, (2, 3, 4))
    assert split is not None and views.axes_of(split) == [{0}, {0}, {1}]
    assert [d[0].stride for d in split.dims] == [3, 1, 1]
    assert views.reshape(split, (6, 4)) == view
    merged = views.reshape(view, (24,))
    assert merged is not None and views.axes_of(merged) == [{0, 1}]
    assert views.reshape(merged, (6, 4)) == view
    assert views.reshape(view, (8, 3)) is None  # 8 cuts across both axes
    part = views.take(view, 0, 3, 2)
    assert part is not None and (part.dims[0][0].stride, part.dims[0][0].size) == (2, 3)
    assert views.take(merged, 0, 5) is None
