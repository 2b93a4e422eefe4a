"""Quantization with calibration data on whole models, against NumPy and by layers.

A program per shape, method and spec is most of the time here: matrices are 8 by 8
wherever their shape is not the point.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from tests.programs.zoo_equinox import equinox_mlp
from tests.quantization.by_hand import all_codes, gptq_by_hand, round_by_hand

F = jopt.formats
INT4 = jopt.QuantSpec(F.int4)
METHODS = {"rtn": jopt.rtn, "gptq": jopt.gptq}
every_method = pytest.mark.parametrize("name", METHODS)
both_ways = pytest.mark.parametrize("in_order", [True, False])
BY_HAND = {
    "rtn": lambda x, w, spec: round_by_hand(w, all_codes(spec))[0],
    "gptq": lambda x, w, spec: gptq_by_hand(w, x.T @ x, all_codes(spec))[0],
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(name, apply, params, batches, spec=INT4, **options):
    return METHODS[name](apply, params, batches, spec, progress=False, **options)


def close(a, b, **tolerances):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerances))


def product(params, x):
    return x @ params["w"]


def mlp(params, x):
    h = jnp.tanh(x @ params["up"] + params["bias"][None])
    return h @ params["down"]


def mlp_params():
    return {"up": draw(8, 8), "down": draw(8, 8, seed=1), "bias": draw(8, seed=2)}


@every_method
@both_ways
def test_an_mlp_is_quantized_as_by_hand_and_the_report_has_its_errors(name, in_order):
    params = mlp_params()
    batches = [draw(20, 8, seed=3), draw(7, 8, seed=4)]  # of two sizes
    packed, report = run(name, mlp, params, iter(batches), error_propagation=in_order)
    x = np.concatenate(batches)
    up = BY_HAND[name](x, params["up"], INT4)
    seen = np.tanh(x @ (up if in_order else params["up"]) + params["bias"])
    down = BY_HAND[name](seen, params["down"], INT4)
    close(packed["up"].to_array(), up)
    close(packed["down"].to_array(), down)
    assert packed["bias"] is params["bias"]
    for key, inputs, q in (("up", x, up), ("down", seen, down)):
        w, row = params[key], report[key]
        lost = np.sum((inputs @ (w - q)) ** 2) / np.sum((inputs @ w) ** 2)
        close(row.error, lost, rtol=1e-3)
        noise = np.sum((w - q) ** 2) / np.sum(w**2)
        close(row.signal_to_noise, -10 * np.log10(noise), rtol=1e-4)
        assert (row.shape, row.format) == (w.shape, "int4")
        assert row.bits == packed[key].bits_per_weight
    worst = report.worst[0]
    assert str(report).split("\n")[2].split()[0] == worst.name
    again, rows = run(
        name, mlp, params, batches, error_propagation=in_order, errors=False
    )
    same = jax.tree.map(np.array_equal, again, packed)
    assert jax.tree.all(same)
    assert [row.error for row in rows] == [None, None]


def test_rtn_is_quantize():
    params = mlp_params()
    x = draw(20, 8, seed=3)
    for spec in (
        jopt.QuantSpec(F.uint4, symmetric=False, group_size=2),
        jopt.QuantSpec(F.int8, axis=()),
        jopt.QuantSpec(F.nf4, scale_dtype=jnp.float32),
    ):
        packed, _ = run("rtn", mlp, params, [x], spec)
        expected = jopt.quantize(
            params, all_codes(spec), sites=jopt.sites(mlp, params, x)
        )
        assert jax.tree.structure(packed) == jax.tree.structure(expected)
        for a, b in zip(*map(jax.tree.leaves, (packed, expected)), strict=True):
            np.testing.assert_array_equal(a, b)


def stacked(params, x):
    def layer(h, one):
        q, k = jnp.tanh(h @ one["q"]), h @ one["k"]
        return h + (q * k) @ one["out"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["head"]


def unstacked(params, x):
    for one in params["blocks"]:
        q, k = jnp.tanh(x @ one["q"]), x @ one["k"]
        x = x + (q * k) @ one["out"]
    return x @ params["head"]


@both_ways
@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(F.int4, group_size=2),
        jopt.QuantSpec(F.uint3, symmetric=False),
        jopt.QuantSpec(F.int8, axis=()),
    ],
    ids=str,
)
def test_layers_of_a_scan_are_quantized_as_those_of_a_python_loop(spec, in_order):
    layers = {
        "q": 0.3 * draw(2, 8, 8),
        "k": 0.3 * draw(2, 8, 8, seed=1),
        "out": draw(2, 8, 8, seed=2),
    }
    params = {"layers": layers, "head": draw(8, 8, seed=3)}
    split = [{k: v[i] for k, v in layers.items()} for i in range(2)]
    apart = {"blocks": split, "head": params["head"]}
    batches = [draw(20, 8, seed=4), draw(20, 8, seed=5)]
    options = {"error_propagation": in_order}
    packed, report = run("gptq", stacked, params, batches, spec, **options)
    other, expected = run("gptq", unstacked, apart, batches, spec, **options)
    floats, others = jopt.dequantize(packed), jopt.dequantize(other)
    for key in layers:
        for i in range(2):
            close(floats["layers"][key][i], others["blocks"][i][key])
            row, same = report[f"layers/{key}[{i}]"], expected[f"blocks/{i}/{key}"]
            assert (row.path, row.layer) == (f"layers/{key}", i)
            close(row.error, same.error, rtol=1e-3)
    close(floats["head"], others["head"])
    x = batches[0]
    close(jopt.execute(stacked)(packed, x), stacked(floats, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_matrices_over_windows(groups):
    params = {"w": draw(3, 2, 8 // groups, 6)}
    x = draw(2, 5, 6, 8, seed=1)

    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (2, 1),
            "VALID",
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    spec = jopt.QuantSpec(F.int4, group_size=4, scale_dtype=jnp.float32)
    packed, report = run("gptq", apply, params, [x], spec)
    assert packed["w"].scale.shape == (3, 2, 8 // groups // 4, 6)
    windows = np.stack(
        [x[:, i : i + 3, j : j + 3 : 2] for i in (0, 2) for j in range(4)], 1
    )
    size, per = 8 // groups, 6 // groups
    found = np.asarray(packed["w"].to_array())
    lost = whole = 0
    for g in range(groups):
        rows = windows[..., g * size : (g + 1) * size].reshape(16, -1)
        w = params["w"][..., g * per : (g + 1) * per].reshape(-1, per)
        q = found[..., g * per : (g + 1) * per].reshape(-1, per)
        close(q, gptq_by_hand(w, rows.T @ rows, all_codes(spec))[0])
        lost += ((rows @ (w - q)) ** 2).sum()
        whole += ((rows @ w) ** 2).sum()
    close(report["w"].error, lost / whole, rtol=1e-3)


def test_attention_kernels_of_three_axes_keep_scales_per_head():
    params = {"q": draw(8, 2, 6), "out": draw(2, 6, 8, seed=1)}

    def apply(params, x):
        q = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, params["q"]))
        return jnp.einsum("bhk,hkd->bd", q, params["out"])

    x = draw(40, 8, seed=2)
    spec = jopt.QuantSpec(F.int4, group_size=3)
    packed, _ = run("gptq", apply, params, [x], {"out": spec, "q": INT4})
    assert packed["q"].scale.shape == (1, 2, 6)
    assert packed["out"].scale.shape == (2, 2, 8)
    q = gptq_by_hand(params["q"].reshape(8, 12), x.T @ x, all_codes(INT4))[0]
    close(packed["q"].to_array().reshape(8, 12), q)
    seen = np.tanh(x @ q)
    out = gptq_by_hand(params["out"].reshape(12, 8), seen.T @ seen, all_codes(spec))[0]
    close(packed["out"].to_array().reshape(12, 8), out)


@both_ways
def test_experts_see_their_own_tokens_and_one_without_any_is_rounded(in_order):
    def apply(params, x, sizes):
        return lax.ragged_dot(x, params["experts"], sizes)

    params = {"experts": draw(3, 6, 4)}
    x = draw(12, 6, seed=1)
    packed, report = run(
        "gptq",
        apply,
        params,
        [(x, jnp.array([5, 0, 7]))],
        error_propagation=in_order,
    )
    found = packed["experts"].to_array()
    for expert, rows in ((0, x[:5]), (2, x[5:])):
        w = params["experts"][expert]
        close(found[expert], gptq_by_hand(w, rows.T @ rows, all_codes(INT4))[0])
    fit = jopt.scale_fits.by_squared_error  # of gptq, though nothing reached it
    simple = jopt.quantize(params["experts"][1], all_codes(INT4), fit=fit)
    close(found[1], simple.to_array())
    assert "rounded to nearest" in report.left_alone["experts"]
    assert "in 1 of 3 matrices" in report.left_alone["experts"]


@both_ways
def test_what_was_not_reached_or_cannot_be_read_is_listed(in_order):
    index = jnp.array([2, 0, 1])

    def apply(params, x, flag):
        x = lax.cond(
            flag, lambda x: x @ params["left"], lambda x: x @ params["right"], x
        )
        x = x @ (params["scaled"] * np.arange(1.0, 9.0, dtype=np.float32)[:, None])
        x = lax.fori_loop(0, 3, lambda i, x: x @ params["mixed"][index[i]], x)
        x = x @ (params["a"] @ params["b"]) @ params["v"][0]
        return x @ params["w"]

    names = ("left", "right", "scaled", "w")
    params = {key: draw(8, 8, seed=i) for i, key in enumerate(names)}
    params |= {"mixed": 0.4 * draw(3, 8, 8), "a": draw(8, 2), "b": draw(2, 8)}
    params |= {"v": draw(2, 8, 8), "unread": draw(3, 3), "norm": draw(8)}
    packed, report = run(
        "gptq", apply, params, [(draw(9, 8), True)], error_propagation=in_order
    )
    why = report.left_alone
    assert why["right"].startswith("rounded to nearest, no input but zeros reached it")
    fit = jopt.scale_fits.by_squared_error  # of gptq
    simple = lambda w: jopt.quantize(w, all_codes(INT4), fit=fit).to_array()  # noqa: E731
    close(packed["right"].to_array(), simple(params["right"]))
    assert "not made of its numbers" in why["scaled"]
    assert "not in their order" in why["mixed"]
    assert "derived#0" in why["a"]
    assert why["unread"] == "never used"
    for key in set(why) - {"right"}:
        assert packed[key] is params[key]
    assert {row.path for row in report} == {"left", "right", "v", "w"}
    assert report["right"].error is None
    # The part of the leaf that nothing multiplies by is rounded to nearest.
    close(packed["v"].to_array()[1], simple(params["v"][1]))


def test_joined_leaves_are_quantized_with_the_inputs_they_share():
    def apply(params, x):
        return x @ jnp.concatenate([params["left"], params["right"]], axis=1)

    params = {"left": draw(6, 4), "right": draw(6, 3, seed=1)}
    x = draw(20, 6, seed=2)
    packed, report = run("gptq", apply, params, [x])
    assert len(report) == 2
    for key, w in params.items():
        assert report[f"derived#0 ({key})"].path == key
        close(packed[key].to_array(), gptq_by_hand(w, x.T @ x, all_codes(INT4))[0])
    close(jopt.execute(apply)(packed, x), apply(jopt.dequantize(packed), x))


@pytest.mark.parametrize("method", [jopt.gptq, jopt.rtn])
def test_groups_need_not_fit_what_is_left_alone(method):
    """A table that is looked up, and a matrix that is read as two."""

    def apply(params, tokens):
        h = params["table"][tokens].reshape(len(tokens), -1) @ params["w"]
        return h @ params["both"] @ params["both"].T

    params = {"table": draw(10, 6), "w": draw(24, 12, seed=1), "both": draw(12, 12)}
    tokens = np.random.default_rng(2).integers(0, 10, (50, 4))
    spec = jopt.QuantSpec(jopt.formats.int4, group_size=8)
    packed, report = method(apply, params, [tokens], spec, progress=False)
    assert packed["w"].spec.group_size == 8 and len(report) == 1
    assert "looked up" in report.left_alone["table"]
    assert "different matrices" in report.left_alone["both"]
    with pytest.raises(ValueError, match="group_size must divide axis -2 of 'w'"):
        method(apply, params, [tokens], jopt.QuantSpec(jopt.formats.int4, group_size=9))


def test_inputs_as_large_as_their_squares_can_be():
    params, x = {"w": draw(16, 4)}, draw(50, 16, seed=1)
    small, large = (
        run("gptq", lambda p, x: x @ p["w"], params, [size * x])[0]["w"]
        for size in (1.0, 2.0**60)
    )
    np.testing.assert_array_equal(small.codes, large.codes)


def test_parts_of_one_leaf_keep_their_own_scales():
    """A fused kernel, whose slices meet different inputs."""

    def apply(params, x):
        return jnp.tanh(x @ params["w"][:, :5]) @ params["w"][:5, 5:]

    params = {"w": draw(8, 9)}
    x = draw(30, 8, seed=1)
    packed, report = run("gptq", apply, params, [x], select=jopt.matching("w"))
    first = gptq_by_hand(params["w"][:, :5], x.T @ x, all_codes(INT4))[0]
    assert [row.path for row in report] == ["w", "w"]
    close(packed["w"].to_array()[:, :5], first)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_params_keep_dtype_and_structure(dtype):
    model = equinox_mlp(8, 8, depth=1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), model.params)
    packed, report = run("gptq", model.apply, params, [model.inputs[0]])
    floats = jopt.dequantize(packed)
    assert jax.tree.structure(floats) == jax.tree.structure(params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(floats))
    assert len(report) >= 2


def test_in_x64_the_codes_are_those_of_float32():
    params, x = mlp_params(), draw(20, 8, seed=3)
    expected, _ = run("gptq", mlp, params, [x])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        packed, _ = run("gptq", mlp, wide, [x.astype(np.float64)])
        assert packed["up"].to_array().dtype == np.float64
        np.testing.assert_array_equal(packed["up"].codes, expected["up"].codes)


def split_model(params, x):
    """Products split over both axes of a mesh, and layers in a scan."""

    def times(x, w, *spec):
        mesh = jax.typeof(x).sharding.mesh
        place = None if mesh.empty else NamedSharding(mesh, P(*spec))
        return jnp.einsum("bi,io->bo", x, w, out_sharding=place)

    h = jnp.tanh(times(x, params["up"], "data", "model"))
    h = times(h, params["down"], "data", None)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])[0]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_the_codes_are_those_of_one_device(kind):
    kinds = (AxisType[kind],) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    params = {"up": draw(8, 8), "down": draw(8, 8, seed=1)}
    params["layers"] = 0.3 * draw(2, 8, 8, seed=2)
    specs = {"up": P(None, "model"), "down": P("model"), "layers": P()}
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    placed = jax.tree.map(jax.device_put, params, shardings)
    batches = [np.rint(3 * draw(24, 8, seed=i)) for i in (4, 5)]
    spread = jax.device_put(batches, NamedSharding(mesh, P("data")))
    spec = jopt.QuantSpec(F.int4, group_size=2)
    packed, report = run("gptq", split_model, placed, spread, spec)
    alone, rows = run("gptq", split_model, params, batches, spec)
    for key in params:
        np.testing.assert_array_equal(packed[key].codes, alone[key].codes)
        close(packed[key].to_array(), alone[key].to_array())
    close([r.error for r in report], [r.error for r in rows], rtol=1e-3)


def test_under_a_set_explicit_mesh_it_is_as_without():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params, x = {"w": draw(8, 8)}, draw(24, 8, seed=1)
    spec = jopt.QuantSpec(F.int4, group_size=2)
    expected, _ = run("gptq", product, params, [x], spec)
    where = NamedSharding(mesh, P(None, "data"))
    with jax.set_mesh(mesh):
        packed, _ = run("gptq", product, jax.device_put(params, where), [x], spec)
        assert packed["w"].to_array().shape == (8, 8)
    np.testing.assert_array_equal(packed["w"].codes, expected["w"].codes)
    assert packed["w"].codes.sharding == where


def test_wrong_arguments_raise_at_once():
    params = {"up": draw(6, 8), "down": draw(8, 5, seed=1), "bias": draw(8, seed=2)}
    x = draw(20, 6, seed=3)

    def go(spec=INT4, batches=(x,), **options):
        return run("gptq", mlp, params, batches, spec, **options)

    for match, call in {
        "group_size must divide": lambda: go(jopt.QuantSpec(F.int4, group_size=4)),
        "axis must leave out the inputs of 'down'": lambda: go(
            jopt.QuantSpec(F.int4, axis=0)
        ),
        "matches none of 3": lambda: go({".*kernel": INT4}),
        "must have something to quantize.*none is selected": lambda: go(
            select=lambda path, leaf: False
        ),
        "block_size must be an integer of at least 1": lambda: go(block_size=0),
        "damping must be at least 0": lambda: go(damping=-1.0),
        "at least one item, got none": lambda: go(batches=[]),
        "inputs of every site must be finite.*'up'": lambda: go(batches=[x * np.nan]),
        "params must be finite.*'up'": lambda: run(
            "gptq", mlp, params | {"up": params["up"] * np.inf}, [x]
        ),
        "must hold plain arrays, got QuantizedArray": lambda: run(
            "gptq", mlp, jopt.quantize(params, INT4), [x]
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="batches must be an iterable"):
        go(batches={"x": x})
    with pytest.raises(TypeError, match=r"spec_or_rules must be a jopt\.QuantSpec"):
        go(spec="int4")


@functools.cache
def row_of(name, of_weights, of_inputs):
    params, x = {"w": draw(8, 8) * of_weights}, draw(64, 8, seed=1) * of_inputs
    return getattr(jopt, name)(product, params, [x], INT4, progress=False)[1]["w"]


@pytest.mark.parametrize(
    ("of_weights", "of_inputs"), [(2.0**90, 1), (2.0**-90, 1), (1, 2.0**56)]
)
def test_reports_hold_at_any_magnitude(of_weights, of_inputs):
    for name in ("gptq", "awq"):
        row, other = row_of(name, 1, 1), row_of(name, of_weights, of_inputs)
        assert row.error > 0
        assert other.error == pytest.approx(row.error, rel=1e-5)
        assert other.signal_to_noise == pytest.approx(row.signal_to_noise)


def test_inputs_whose_squares_overflow_are_told_from_those_that_are_not_finite():
    with pytest.raises(ValueError, match="squares are infinite in float32"):
        jopt.gptq(product, {"w": draw(16, 6)}, [draw(8, 16) * np.float32(1e20)], INT4)
