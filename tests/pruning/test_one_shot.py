"""SparseGPT and Wanda on whole models, against the papers' equations in NumPy.

A program per shape, method and sparsity is most of the time here: matrices are 8 by 8
wherever their shape is not the point.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from jopt.programs import statistics
from tests.programs.zoo_equinox import equinox_mlp

METHODS = {"wanda": jopt.wanda, "sparsegpt": jopt.sparsegpt}
every_method = pytest.mark.parametrize("name", METHODS)
both_ways = pytest.mark.parametrize("in_order", [True, False])


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def prune(name, apply, params, batches, **options):
    options = {"sparsity": 0.5, "progress": False} | options
    if isinstance(options.get("pattern"), jopt.NM):
        options["sparsity"] = None
    return METHODS[name](apply, params, batches, **options)


# The equations, as slow as they are plain. x [rows, inputs], w [inputs, outputs].


def keep_best(scores, sparsity):
    """Keep all but round(sparsity * n), ties to the lower index."""
    kept = scores.size - round(sparsity * scores.size)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:kept]] = True
    return mask.reshape(scores.shape)


def wanda_by_hand(x, w, sparsity=0.5):
    scores = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    mask = np.stack([keep_best(s, sparsity) for s in scores.T], 1)
    return np.where(mask, w, 0), mask


def sparsegpt_by_hand(x, w, sparsity=0.5, block=128):
    w, x = w.astype(np.float64), x.astype(np.float64)
    hessian = x.T @ x
    damping = 0.01 * np.mean(np.diag(hessian))
    inverse = np.linalg.inv(hessian + damping * np.eye(len(w)))
    upper = np.linalg.cholesky(inverse).T
    mask = np.ones(w.shape, bool)
    for start in range(0, len(w), block):
        part = slice(start, start + block)
        scores = w[part] ** 2 / np.diag(upper)[part, None] ** 2
        mask[part] = keep_best(scores, sparsity)
        for i in range(start, min(start + block, len(w))):
            error = np.where(mask[i], 0, w[i]) / upper[i, i]
            w[i:] -= np.outer(upper[i, i:], error)
            w[i] = np.where(mask[i], w[i], 0)
    return w, mask


BY_HAND = {"wanda": wanda_by_hand, "sparsegpt": sparsegpt_by_hand}


def error_by_hand(x, w, pruned):
    return ((x @ (w - pruned)) ** 2).sum() / ((x @ w) ** 2).sum()


def mlp(params, x):
    h = jnp.tanh(x @ params["up"] + params["bias"][None])
    return h @ params["down"]


def mlp_params():
    return {"up": draw(8, 8), "down": draw(8, 8, seed=1), "bias": draw(8, seed=2)}


BATCHES = (draw(20, 8, seed=3), draw(7, 8, seed=4))  # of two sizes


@functools.cache
def pruned_mlp(name, in_order):
    return prune(name, mlp, mlp_params(), iter(BATCHES), error_propagation=in_order)


def close(a, b, **tolerances):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerances))


@every_method
@both_ways
def test_an_mlp_is_pruned_as_by_hand_and_the_report_has_its_errors(name, in_order):
    params = mlp_params()
    sparse, masks, report = pruned_mlp(name, in_order)
    x = np.concatenate(BATCHES)
    up, up_mask = BY_HAND[name](x, params["up"])
    seen = np.tanh(x @ (up if in_order else params["up"]) + params["bias"])
    down, down_mask = BY_HAND[name](seen, params["down"])
    np.testing.assert_array_equal(masks["up"], up_mask)
    np.testing.assert_array_equal(masks["down"], down_mask)
    close(sparse["up"], up)
    close(sparse["down"], down)
    assert isinstance(masks["bias"], optax.MaskedNode)
    assert np.array_equal(sparse["bias"], params["bias"])
    for got, mask in ((sparse["up"], up_mask), (sparse["down"], down_mask)):
        assert not np.any(np.asarray(got)[~mask])
    close(report["up"].error, error_by_hand(x, params["up"], up), rtol=1e-3)
    close(report["down"].error, error_by_hand(seen, params["down"], down), rtol=1e-3)
    assert [row.name for row in report] == ["up", "down"]
    assert report["up"].shape == (8, 8)
    assert report["down"].sparsity == 1 - down_mask.mean()
    assert not report.left_alone
    again = jopt.apply_masks(sparse, masks)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, sparse))


@every_method
@both_ways
def test_without_errors_the_rest_is_the_same(name, in_order, monkeypatch):
    sparse, masks, report = pruned_mlp(name, in_order)
    if name == "wanda":  # which then has no use for Gram matrices
        monkeypatch.delattr(statistics, "gram_below")
    again, same, rows = prune(
        name, mlp, mlp_params(), BATCHES, errors=False, error_propagation=in_order
    )
    for leaf in ("up", "down"):
        np.testing.assert_array_equal(masks[leaf], same[leaf])
        close(sparse[leaf], again[leaf])
    assert [row.error for row in rows] == [None, None]
    assert rows.worst == ()
    assert [row.sparsity for row in rows] == [row.sparsity for row in report]
    assert "up" in str(rows)


@every_method
@both_ways
def test_in_x64_weights_that_do_not_change_keep_all_their_bits(name, in_order):
    params = {key: leaf.astype(np.float64) / 3 for key, leaf in mlp_params().items()}
    batches = [batch.astype(np.float64) for batch in BATCHES]
    _, expected, _ = pruned_mlp(name, in_order)
    with jax.enable_x64(True):
        sparse, masks, report = prune(
            name, mlp, params, batches, error_propagation=in_order
        )
        for leaf in ("up", "down"):
            assert sparse[leaf].dtype == np.float64
            if leaf == "up":
                np.testing.assert_array_equal(masks[leaf], expected[leaf])
            if name == "wanda":
                kept = np.asarray(masks[leaf])
                assert np.array_equal(
                    np.asarray(sparse[leaf])[kept], params[leaf][kept]
                )
        assert all(0 < row.error < 1 for row in report)


@every_method
def test_n_of_m_runs_along_the_inputs(name):
    params = {"w": draw(5, 8)}  # outputs first, as torch and Equinox have it
    apply = lambda params, x: x @ params["w"].T  # noqa: E731
    batch = draw(20, 8, seed=1)
    _, masks, report = prune(name, apply, params, [batch], pattern=jopt.NM(2, 4))
    assert (np.asarray(masks["w"]).reshape(5, 2, 4).sum(-1) == 2).all()
    assert report["w"].shape == (8, 5)
    if name == "wanda":
        scores = np.abs(params["w"]) * np.linalg.norm(batch, axis=0)
        groups = scores.reshape(5, 2, 4)
        best = np.argsort(-groups, axis=-1)[..., :2]
        expected = np.zeros(groups.shape, bool)
        np.put_along_axis(expected, best, True, -1)
        np.testing.assert_array_equal(masks["w"], expected.reshape(5, 8))


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


@every_method
@both_ways
def test_layers_of_a_scan_are_pruned_as_those_of_a_python_loop(name, in_order):
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
    sparse, masks, report = prune(name, stacked, params, batches, **options)
    other, other_masks, expected = prune(name, unstacked, apart, batches, **options)
    for key in layers:
        for i in range(2):
            mask, block = masks["layers"][key][i], other_masks["blocks"][i]
            np.testing.assert_array_equal(mask, block[key])
            close(sparse["layers"][key][i], other["blocks"][i][key])
            row = report[f"layers/{key}[{i}]"]
            assert (row.path, row.layer) == (f"layers/{key}", i)
            close(row.error, expected[f"blocks/{i}/{key}"].error, rtol=1e-3)
    np.testing.assert_array_equal(masks["head"], other_masks["head"])
    # In the order of the program: layer by layer.
    names = ["q", "k", "out"]
    order = [f"layers/{key}[{i}]" for i in range(2) for key in names]
    assert [row.name for row in report] == [*order, "head"]


def test_the_recording_program_is_compiled_once_and_shared_inputs_share_a_pass(caplog):
    passes = []
    batch = draw(20, 8, seed=4)

    class Batches:
        def __iter__(self):
            passes.append(1)
            return iter([batch])

    layers = {key: 0.3 * draw(2, 8, 8) for key in ("q", "k", "out")}
    params = {"layers": layers, "head": draw(8, 8)}
    apply = lambda params, x: stacked(params, x)  # noqa: E731 -- unknown to any cache
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        prune("wanda", apply, params, Batches())
    # One look at the shapes; q and k share an input; out; and the head.
    assert len(passes) == 1 + 2 * 2 + 1
    assert caplog.text.count("Finished XLA compilation of jit(run)") == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_matrices_over_windows(groups):
    params = {"w": draw(3, 2, 4 // groups, 6)}
    x = draw(2, 5, 6, 4, seed=1)

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

    sparse, masks, report = prune("wanda", apply, params, [x])
    windows = np.stack(
        [x[:, i : i + 3, j : j + 3 : 2] for i in (0, 2) for j in range(4)], 1
    )
    size, per = 4 // groups, 6 // groups
    lost = whole = 0
    for g in range(groups):
        rows = windows[..., g * size : (g + 1) * size].reshape(16, -1)
        w = params["w"][..., g * per : (g + 1) * per].reshape(-1, per)
        pruned, mask = wanda_by_hand(rows, w)
        found = np.asarray(masks["w"])[..., g * per : (g + 1) * per]
        np.testing.assert_array_equal(found.reshape(-1, per), mask)
        lost += ((rows @ (w - pruned)) ** 2).sum()
        whole += ((rows @ w) ** 2).sum()
    close(report["w"].error, lost / whole, rtol=1e-3)
    shape = (3 * 2 * size, per)
    assert report["w"].shape == (shape if groups == 1 else (groups, *shape))
    assert sparse["w"].shape == params["w"].shape


@both_ways
def test_experts_see_their_own_tokens_and_one_without_any_stays_dense(in_order):
    def apply(params, x, sizes):
        return lax.ragged_dot(x, params["experts"], sizes)

    params = {"experts": draw(3, 6, 4)}
    x = draw(12, 6, seed=1)
    options = {"error_propagation": in_order}
    sparse, masks, report = prune(
        "wanda", apply, params, [(x, jnp.array([5, 0, 7]))], **options
    )
    for expert, rows in ((0, x[:5]), (2, x[5:])):
        pruned, mask = wanda_by_hand(rows, params["experts"][expert])
        np.testing.assert_array_equal(masks["experts"][expert], mask)
        close(sparse["experts"][expert], pruned)
    np.testing.assert_array_equal(sparse["experts"][1], params["experts"][1])
    assert np.all(masks["experts"][1])
    assert "in 1 of 3 matrices" in report.left_alone["experts"]
    close(report["experts"].sparsity, 1 / 3)


@every_method
def test_tied_leaves_are_listed_and_leaves_called_twice_see_both_inputs(name):
    def apply(params, ids):
        h = params["table"][ids] @ params["twice"]
        return jnp.tanh(h) @ params["twice"] @ params["table"].T

    params = {"table": draw(11, 8), "twice": draw(8, 8, seed=1)}
    ids = np.random.default_rng(0).integers(11, size=(30,))
    sparse, masks, report = prune(name, apply, params, [ids], error_propagation=False)
    assert "looked up" in report.left_alone["table"]
    assert isinstance(masks["table"], optax.MaskedNode)
    assert sparse["table"] is params["table"]
    first = params["table"][ids]
    both = np.concatenate([first, np.tanh(first @ params["twice"])])
    np.testing.assert_array_equal(
        masks["twice"], BY_HAND[name](both, params["twice"])[1]
    )
    _, masks, report = prune(
        name, apply, params, [ids], select=jopt.matching("table"), sparsity=0.25
    )
    assert report["table#1"].path == "table"
    hidden = np.tanh(first @ params["twice"]) @ params["twice"]
    expected = BY_HAND[name](hidden, params["table"].T, 0.25)[1]
    np.testing.assert_array_equal(masks["table"], expected.T)
    assert "twice" not in report.left_alone  # nobody asked for it


@both_ways
def test_what_was_not_reached_or_cannot_be_read_is_listed_not_pruned(in_order):
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

    sparse, masks, report = prune(
        "wanda", apply, params, [(draw(9, 8), True)], error_propagation=in_order
    )
    why = report.left_alone
    assert why["right"].startswith("no input but zeros reached it")
    assert "not made of its numbers" in why["scaled"]
    assert "not in their order" in why["mixed"]
    assert "derived#0" in why["a"]
    assert why["unread"] == "never used"
    for key in why:
        assert isinstance(masks[key], optax.MaskedNode)
        np.testing.assert_array_equal(sparse[key], params[key])
    assert {row.path for row in report} == {"left", "v", "w"}
    assert np.all(masks["v"][1])  # the part of the leaf that nothing multiplies by
    np.testing.assert_array_equal(sparse["v"][1], params["v"][1])
    text = str(report)
    assert "left alone:" in text
    assert "right: no input" in text
    assert report.worst[0].error == max(row.error for row in report)
    assert report.to_dicts()[0]["path"] == report.rows[0].path
    with pytest.raises(KeyError, match="no layer 'right'; there are"):
        report["right"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def linen():
    module, x = Linen(), draw(2, 5, 5, 3)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    return jopt.functional(module, params), x


def nnx_model():
    return jopt.functional(Nnx(nnx.Rngs(0))), draw(2, 5, 5, 3)


def equinox_model():
    model = equinox_mlp(8, 8, depth=1)
    return (model.apply, model.params), model.inputs[0]


@pytest.mark.parametrize("build", [linen, nnx_model, equinox_model])
def test_models_of_every_framework_keep_their_structure(build):
    (apply, params), x = build()
    half = jax.tree.map(
        lambda leaf: draw(*leaf.shape, dtype=jnp.bfloat16.dtype), params
    )
    sparse, masks, report = prune("sparsegpt", apply, half, [x])
    assert jax.tree.structure(sparse) == jax.tree.structure(half)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(sparse))
    assert len(report) >= 2
    assert all(0.3 < row.sparsity < 0.7 for row in report)
    again = jopt.apply_masks(sparse, masks)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, sparse))
    assert jnp.isfinite(apply(sparse, x)).all()
    whole = jax.tree.map(np.zeros_like, half)
    assert jax.tree.structure(jopt.apply_masks(whole, masks)) == (
        jax.tree.structure(params)
    )


def test_joined_leaves_are_pruned_with_the_inputs_they_share():
    def apply(params, x):
        both = jnp.concatenate([params["left"], params["right"]], axis=1)
        return x @ both

    params = {"left": draw(6, 4), "right": draw(6, 3, seed=1)}
    x = draw(20, 6, seed=2)
    for in_order in (True, False):
        _, masks, report = prune(
            "wanda", apply, params, [x], error_propagation=in_order
        )
        assert len(report) == 2
        for key, w in params.items():
            pruned, mask = wanda_by_hand(x, w)
            np.testing.assert_array_equal(masks[key], mask)
            close(report.rows[key == "right"].error, error_by_hand(x, w, pruned))


@pytest.mark.parametrize(
    ("name", "in_order"),
    [
        ("wanda", False),
        ("sparsegpt", True),
        pytest.param("wanda", True, marks=pytest.mark.exhaustive),
        pytest.param("sparsegpt", False, marks=pytest.mark.exhaustive),
    ],
)
def test_rules_and_allocations_give_each_layer_its_own_sparsity(name, in_order):
    params, x = mlp_params(), draw(20, 8, seed=3)
    options = {"error_propagation": in_order}
    _, masks, report = prune(
        name, mlp, params, [x], sparsity={"up": 0.25, ".*": None}, **options
    )
    assert report.left_alone == {"down": "no rule gives it a sparsity"}
    assert report["up"].sparsity == pytest.approx(0.25, abs=0.1)
    _, masks, report = prune(
        name, mlp, params, [x], sparsity=0.5, pattern={"down": jopt.NM(2, 4)}, **options
    )
    assert (np.asarray(masks["down"]).reshape(2, 4, 8).sum(1) == 2).all()
    params["up"] = 3 * params["up"]
    _, _, report = prune(
        name,
        mlp,
        params,
        [x],
        sparsity=0.5,
        allocation=jopt.allocation.global_ranking,
        **options,
    )
    assert report["up"].sparsity < 0.4 < 0.6 < report["down"].sparsity
    zeros = sum(row.sparsity * np.prod(row.shape) for row in report)
    assert zeros == pytest.approx(0.5 * (8 * 8 + 8 * 8), abs=8)  # rounded per output


def split_model(params, x):
    """Products split over both axes of a mesh, and layers in a scan."""

    def times(x, w, *spec):
        mesh = jax.typeof(x).sharding.mesh
        place = None if mesh.empty else NamedSharding(mesh, P(*spec))
        return jnp.einsum("bi,io->bo", x, w, out_sharding=place)

    h = jnp.tanh(times(x, params["up"], "data", "model"))
    h = times(h, params["down"], "data", None)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])[0]


@pytest.mark.parametrize(
    ("name", "kind", "in_order"),
    [  # nearly all of the time goes into compiling for eight devices
        ("sparsegpt", "Explicit", True),
        ("wanda", "Auto", False),
        pytest.param("sparsegpt", "Auto", True, marks=pytest.mark.exhaustive),
        pytest.param("wanda", "Explicit", True, marks=pytest.mark.exhaustive),
        pytest.param("wanda", "Explicit", False, marks=pytest.mark.exhaustive),
    ],
)
def test_on_a_mesh_the_masks_are_those_of_one_device(name, kind, in_order):
    kinds = (AxisType[kind],) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    params = {"up": draw(8, 8), "down": draw(8, 8, seed=1)}
    params["layers"] = 0.3 * draw(2, 8, 8, seed=2)
    specs = {"up": P(None, "model"), "down": P("model"), "layers": P()}
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    placed = jax.tree.map(jax.device_put, params, shardings)
    batches = [draw(24, 8, seed=i) for i in (4, 5)]
    spread = jax.device_put(batches, NamedSharding(mesh, P("data")))
    options = {"error_propagation": in_order}
    sparse, masks, report = prune(name, split_model, placed, spread, **options)
    alone, expected, rows = prune(name, split_model, params, batches, **options)
    for key in params:
        np.testing.assert_array_equal(masks[key], expected[key])
        close(sparse[key], alone[key], rtol=1e-3)
        assert sparse[key].sharding == placed[key].sharding
        assert masks[key].sharding == placed[key].sharding
    close([r.error for r in report], [r.error for r in rows], rtol=1e-3)


def test_an_allocation_on_a_mesh_is_that_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x = mlp_params(), draw(24, 8, seed=4)
    options = {"allocation": jopt.allocation.owl(), "sparsity": 0.6}
    specs = {"up": P(None, "data"), "down": P("data"), "bias": P()}
    placed = {
        k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()
    }
    _, masks, _ = prune("wanda", mlp, placed, [x], **options)
    _, expected, _ = prune("wanda", mlp, params, [x], **options)
    for key in ("up", "down"):
        np.testing.assert_array_equal(masks[key], expected[key])


def test_wrong_arguments_raise_at_once():
    params = {"up": draw(6, 8), "down": draw(8, 5, seed=1), "bias": draw(8, seed=2)}
    x = draw(20, 6, seed=3)
    go = lambda **kw: jopt.wanda(mlp, params, [x], progress=False, **kw)  # noqa: E731
    for match, options in {
        "sparsity must be given for Unstr": {},
        r"sparsity must be None for NM\(n=2": {
            "sparsity": 0.5,
            "pattern": jopt.NM(2, 4),
        },
        "got 6 inputs at 'up'": {"pattern": jopt.NM(2, 4)},
        "axis=-1: N:M runs along": {"pattern": jopt.NM(2, 4, axis=-1)},
        r"fraction in \[0, 1\], got 50": {"sparsity": 50},
        "matches none of 3": {"sparsity": {".*kernel": 0.5}},
        "must be None where the pattern is NM.*'down'": {
            "sparsity": {".*": 0.5},
            "pattern": {"down": jopt.NM(2, 4)},
        },
        "must come with one sparsity": {
            "sparsity": {".*": 0.5},
            "allocation": jopt.allocation.uniform,
        },
        "must have something to prune.*none is selected": {
            "sparsity": 0.5,
            "select": lambda path, leaf: False,
        },
        "bias: used by add": {"sparsity": 0.5, "select": jopt.matching("bias")},
    }.items():
        with pytest.raises(ValueError, match=match):
            go(**options)
    for match, options in {
        "pattern must be jopt.Unstructured": {"pattern": jopt.Block((2, 2))},
        "sparsity must be a number": {"sparsity": "half"},
        "allocation must be a function": {"sparsity": 0.5, "allocation": "owl"},
    }.items():
        with pytest.raises(TypeError, match=match):
            go(**({"sparsity": 0.5} | options))
    with pytest.raises(ValueError, match="at least one item, got none"):
        jopt.wanda(mlp, params, [], sparsity=0.5)
    with pytest.raises(TypeError, match="batches must be an iterable"):
        jopt.wanda(mlp, params, {"x": x}, sparsity=0.5)
    quantized = jopt.quantize(params, jopt.QuantSpec(jopt.formats.int8))
    with pytest.raises(ValueError, match="plain arrays, got QuantizedArray at 'down'"):
        jopt.wanda(mlp, quantized, [x], sparsity=0.5)
    x[3, 2] = np.nan
    for in_order in (True, False):
        with pytest.raises(ValueError, match=r"must be finite.*'up'"):
            go(sparsity=0.5, error_propagation=in_order)


@pytest.mark.parametrize("placed", [False, True])
def test_under_a_set_explicit_mesh_it_is_as_without(placed):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params, x = {"w": draw(8, 8)}, draw(24, 8, seed=1)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    options = {"allocation": jopt.allocation.owl(), "error_propagation": False}
    _, expected, _ = prune("wanda", apply, params, [x], **options)
    where = NamedSharding(mesh, P(None, "data"))
    with jax.set_mesh(mesh):
        given = jax.device_put(params, where) if placed else params
        _, masks, report = prune("wanda", apply, given, [x], **options)
    np.testing.assert_array_equal(masks["w"], expected["w"])
    assert 0 < report["w"].error < 1
    if placed:
        assert masks["w"].sharding == where


@every_method
def test_weights_that_are_no_numbers_raise(name):
    params = mlp_params()
    params["down"][1, 2] = np.nan
    with pytest.raises(ValueError, match=r"params must be finite.*'down'"):
        prune(name, mlp, params, BATCHES)


@pytest.mark.parametrize("factor", [2.0**90, 2.0**-90])
def test_reports_hold_at_any_magnitude(factor):
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=s).astype(np.float32) for s in ((8, 8), (64, 8)))
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    rows = [
        jopt.sparsegpt(apply, {"w": w * a}, [x], sparsity=0.5, progress=False)[2]["w"]
        for a in (1, factor)
    ]
    assert rows[0].error > 0
    assert rows[1].error == pytest.approx(rows[0].error, rel=1e-5)
