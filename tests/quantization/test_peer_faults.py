"""Faults seen in other quantization libraries for JAX, each shown to be impossible."""

import functools
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jopt
from jopt.arrays.quantized import fake_quantize as fake_quantize_array
from jopt.quantization.gptq import gptq_matrix

INT8 = jopt.QuantSpec(jopt.formats.int8)
INT4 = jopt.QuantSpec(jopt.formats.int4)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def matmul(params, x):
    return x @ params["w"]


def int_products(function, *args):
    text = jax.jit(function).lower(*args).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    return sum("xi8>" in line and "xi32>" in line for line in lines), len(lines)


# Interception that leaks through JAX's caches of traces, or is missed because of them.


@pytest.mark.parametrize("float_first", [True, False])
def test_a_float_model_stays_float_and_a_quantized_one_quantized(float_first):
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    want = np.asarray(x) @ np.asarray(params["w"])
    qat = jopt.fake_quantize(matmul, INT8, activations=INT8)
    other = jopt.fake_quantize(matmul, INT4, activations=INT4)
    quantized = [np.asarray(f(params, x)) for f in (qat, other) if not float_first]
    np.testing.assert_allclose(matmul(params, x), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(matmul)(params, x), want, rtol=1e-5)
    np.testing.assert_allclose(x @ params["w"], want, rtol=1e-5)
    quantized = quantized or [np.asarray(f(params, x)) for f in (qat, other)]
    errors = [np.abs(q - want).max() for q in quantized]
    assert 0 < errors[0] < errors[1]


def test_nothing_of_jax_is_patched():
    before = {name: getattr(lax, name) for name in ("dot_general", "dot")}
    codes = {name: f.__code__ for name, f in before.items() if hasattr(f, "__code__")}
    seen = []

    def compute_float():
        seen.append(np.asarray(normal(2, 2) @ jnp.eye(2)))

    thread = threading.Thread(target=compute_float)
    qat = jopt.fake_quantize(matmul, INT8, activations=INT8)
    thread.start()
    qat({"w": normal(6, 3)}, normal(4, 6))
    thread.join()
    for name, function in before.items():
        assert getattr(lax, name) is function
        assert codes.get(name) is getattr(function, "__code__", None)
    assert len(seen) == 1


# Flax only, one method, attributes written onto modules.


def test_plain_functions_equinox_and_any_method_of_nnx():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

        def encode(self, x):
            return self.layer(x)

    module = Model()
    before = set(vars(module)) | set(vars(module.layer))
    x = normal(4, 6)
    for apply, params in (
        jopt.functional(module, method="encode"),
        jopt.functional(eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))),
        (matmul, {"w": normal(6, 3)}),
    ):
        inputs = x[0] if isinstance(params, eqx.Module) else x
        qat = jopt.fake_quantize(apply, INT8, activations=INT8)
        error = jnp.abs(qat(params, inputs) - apply(params, inputs)).max()
        assert 0 < error < 0.1
    assert set(vars(module)) | set(vars(module.layer)) == before


# No address for a parameter; op numbers that change with the order of calls.


def test_two_weights_of_one_module_get_specs_of_their_own():
    def apply(params, x):
        return x @ params["layer"]["gate"] + x @ params["layer"]["up"]

    params = {"layer": {"gate": normal(6, 3), "up": normal(6, 3)}}
    x = normal(4, 6)
    qat = jopt.fake_quantize(apply, {"layer/gate": INT4, "layer/up": None})
    gate = fake_quantize_array(params["layer"]["gate"], INT4)
    want = x @ gate + x @ params["layer"]["up"]
    np.testing.assert_allclose(qat(params, x), want, rtol=1e-6)


def test_names_do_not_depend_on_the_order_of_calls():
    def apply(params, x, *, flip):
        first, second = ("a", "b") if flip else ("b", "a")
        return (x @ params[first]) @ params[second]

    params, x = {"a": normal(4, 4), "b": normal(4, 4)}, normal(2, 4)
    names = [
        set(jopt.sites(lambda p, x, f=flip: apply(p, x, flip=f), params, x).names)
        for flip in (True, False)
    ]
    assert names[0] == names[1] == {"a", "b"}


# Weights told from activations by their shape; transposed and tied weights that fail.


def test_same_shapes_transposes_and_tied_weights():
    def apply(params, tokens):
        x = params["embed"][tokens]
        x = x @ params["a"] + x @ params["b"] + x @ params["c"].T.T
        return x @ params["embed"].T

    params = {name: normal(5, 5) for name in ("embed", "a", "b", "c")}
    tokens = jnp.array([0, 3, 1])
    table = jopt.sites(apply, params, tokens)
    assert set(table.names) == {"embed", "a", "b", "c", "embed#1"}
    packed = jopt.quantize(params, INT8, sites=table)
    assert all(isinstance(leaf, jopt.QuantizedArray) for leaf in packed.values())
    want = apply(jopt.dequantize(packed), tokens)
    np.testing.assert_allclose(jopt.execute(apply)(packed, tokens), want, rtol=1e-5)
    y = jopt.execute(apply, activations=INT8)(packed, tokens)
    assert 0 < jnp.abs(y - want).max() < 0.2 * jnp.abs(want).max()


# What was skipped in silence, or raised.


def test_activations_alone_are_quantized():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    y = jopt.fake_quantize(matmul, None, activations=INT4)(params, x)
    want = fake_quantize_array(x, jopt.QuantSpec(jopt.formats.int4, axis=0))
    np.testing.assert_allclose(y, want @ params["w"], rtol=1e-6)
    assert jnp.abs(y - x @ params["w"]).max() > 1e-3


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: lax.dot(x, w),
        lambda x, w: jnp.dot(x, w),
        lambda x, w: jnp.matmul(x, w),
        lambda x, w: jnp.tensordot(x, w, 1),
        lambda x, w: jnp.einsum("bi,io->bo", x, w),
        lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
        lambda x, w: jnp.vdot(x[0], w[:, 0]),
        lambda x, w: jax.vmap(lambda row: row @ w)(x),
        lambda x, w: jnp.einsum("bi,io,b->bo", x, w, jnp.arange(4.0)),
    ],
)
def test_every_way_to_write_a_product_is_quantized(product):
    def apply(params, x):
        return product(x, params["w"])

    params, x = {"w": normal(6, 3)}, normal(4, 6)
    y = jopt.fake_quantize(apply, INT4, activations=INT4)(params, x)
    assert jnp.abs(y - apply(params, x)).max() > 1e-3
    packed = jopt.quantize(params, INT4, sites=jopt.sites(apply, params, x))
    assert isinstance(packed["w"], jopt.QuantizedArray)
    got = jopt.execute(apply, activations=INT4)(packed, x)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


def test_lookups_are_quantized():
    def apply(params, tokens):
        return params["table"][tokens]

    params, tokens = {"table": normal(7, 4)}, jnp.array([[1, 6], [0, 0]])
    packed = jopt.quantize(params, INT4, sites=jopt.sites(apply, params, tokens))
    assert packed["table"].scale.shape == (7, 1)
    want = jopt.dequantize(packed)["table"][tokens]
    np.testing.assert_array_equal(jopt.execute(apply)(packed, tokens), want)


# Convolutions: weights alone, asymmetric, in groups; two asymmetric operands of a dot.

ASYMMETRIC = jopt.QuantSpec(jopt.formats.int8, symmetric=False)


@pytest.mark.parametrize(
    "spec",
    [INT8, ASYMMETRIC, INT4, jopt.QuantSpec(jopt.formats.int4, group_size=2)],
    ids=repr,
)
@pytest.mark.parametrize("activations", [None, INT8, ASYMMETRIC], ids=repr)
def test_any_spec_of_a_convolution(spec, activations):
    def apply(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"w": normal(3, 3, 4, 5)}, normal(2, 6, 6, 4)
    packed = jopt.quantize(params, spec, sites=jopt.sites(apply, params, x))
    qat = jopt.fake_quantize(apply, spec, activations=activations)
    y = jopt.execute(apply, activations=activations)(packed, x)
    np.testing.assert_allclose(y, qat(params, x), rtol=1e-4, atol=1e-4)


def test_two_asymmetric_operands():
    params, x = {"w": normal(6, 3) + 1}, normal(4, 6) + 2
    packed = jopt.quantize(params, ASYMMETRIC, sites=jopt.sites(matmul, params, x))
    run = jopt.execute(matmul, activations=ASYMMETRIC)
    assert int_products(run, packed, x) == (1, 1)
    want = jopt.fake_quantize(matmul, ASYMMETRIC, activations=ASYMMETRIC)(params, x)
    np.testing.assert_allclose(run(packed, x), want, rtol=1e-5)
    assert jnp.abs(want - x @ params["w"]).max() < 0.2


# Formats that quantize everything to zero, clip in silence, or are stored too wide.


def test_formats_are_what_they_say():
    w = normal(64, 4)
    for bits, format in ((1, jopt.formats.binary), (2, jopt.formats.int2),
                         (3, jopt.formats.int3), (4, jopt.formats.nf4)):  # fmt: skip
        q = jopt.quantize(w, jopt.QuantSpec(format))
        assert q.codes.nbytes == w.size * bits // 8
        assert jnp.count_nonzero(jopt.dequantize(q)) > 0
    for bits in (5, 6, 7):  # stored in their own bits, not in eight
        q = jopt.quantize(w, jopt.QuantSpec(getattr(jopt.formats, f"int{bits}")))
        assert q.codes.nbytes == w.size * bits // 8
    for format in (jopt.formats.uint4, jopt.formats.uint2):
        back = jopt.dequantize(
            jopt.quantize(w, jopt.QuantSpec(format, symmetric=False))
        )
        assert back.min() < 0 < back.max()
    with pytest.raises(ValueError, match="symmetric must be False"):
        jopt.QuantSpec(jopt.formats.uint8)
    q = jopt.quantize(w, jopt.QuantSpec(jopt.formats.uint8, symmetric=False))
    assert jnp.abs(jopt.dequantize(q) - w).max() < 0.05
    assert jopt.dequantize(q).min() < 0


# Inference that multiplies floats by integers.


def test_static_activations_are_really_integers():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    calibration = jopt.calibrate(matmul, params, [x])
    packed = jopt.quantize(params, calibration)
    run = jopt.execute(matmul, activations=calibration)
    assert int_products(run, packed, x) == (1, 1)


def test_smoothed_inference_multiplies_integers_whatever_the_leaf_is_called():
    """And in any format: smoothing is a function and params, no provider of its own."""

    def apply(params, x):
        h = (x / jnp.std(x)) * params["norm"][None]
        return jnp.tanh(h @ params["up"]) @ params["down"]

    params = {"norm": jnp.ones(8), "up": normal(8, 16), "down": normal(16, 3)}
    x = normal(4, 8) * jnp.where(jnp.arange(8)[None] == 2, 50.0, 1.0)
    smoothed, smooth_params = jopt.smooth(apply, params, [x], alpha=0.5)
    np.testing.assert_allclose(smoothed(smooth_params, x), apply(params, x), rtol=1e-4)
    for spec in (INT8, INT4):
        packed = jopt.quantize(
            smooth_params, spec, select=jopt.matching("params/(up|down)")
        )
        run = jopt.execute(smoothed, activations=INT8)
        assert int_products(run, packed, x) == (2, 2)


# GPTQ for some grids alone, without an order, and compiled column by column.


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        jopt.QuantSpec(jopt.formats.int3, group_size=8),
        jopt.QuantSpec(jopt.formats.nf4, group_size=8),
        jopt.QuantSpec(jopt.formats.uint4, symmetric=False),
        jopt.QuantSpec(jopt.formats.int5, symmetric=False, group_size=8),
    ],
    ids=str,
)
def test_gptq_on_grids_that_were_refused(spec, order):
    rng = np.random.default_rng(0)  # whatever other tests drew before
    x, mix, w = (rng.normal(size=size) for size in ((64, 16), (16, 16), (16, 24)))
    x = jnp.asarray(x @ mix, jnp.float32)
    params = {"w": jnp.asarray(w, jnp.float32)}
    error = {}
    for name, method in (("gptq", jopt.gptq), ("rtn", jopt.rtn)):
        options = {"activation_order": order} if name == "gptq" else {}
        packed, _ = method(matmul, params, [x], spec, **options)
        error[name] = float(jnp.sum((x @ (packed["w"].to_array() - params["w"])) ** 2))
    assert error["gptq"] < error["rtn"]


def test_gptq_of_more_columns_is_no_longer_program():
    """Columns are turns of a loop: 1024 take as many equations as 256.

    But for line breaks in what is printed.
    """

    def solve(size):
        spec = jopt.QuantSpec(jopt.formats.int4, group_size=128)
        run = functools.partial(gptq_matrix, spec=spec)
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size, 8), (size,) * 2)
        ]
        return len(str(jax.make_jaxpr(run)(*shapes)).splitlines())

    assert solve(1024) < 1.01 * solve(256)


# Static ranges under nn.scan; means in place of observers.


def test_static_ranges_of_scanned_layers_need_no_change_to_the_model():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(6, use_bias=False)(x)) * 2, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers()(x, None)[0]

    x = normal(4, 6)
    apply, params = jopt.functional(Model(), Model().init(jax.random.key(0), x))
    calibration = jopt.calibrate(apply, params, [x])
    (ends,) = (pair[0] for pair in calibration.activations.values())
    kernel = jax.tree.leaves(params)[0]
    layer, want = x, []
    for w in kernel:
        want.append(jnp.abs(layer).max())
        layer = nn.relu(layer @ w) * 2
    np.testing.assert_allclose(ends.high, jnp.stack(want), rtol=1e-6)
    packed = jopt.quantize(params, calibration)
    got = jopt.execute(apply, activations=calibration)(packed, x)
    want = jopt.fake_quantize(apply, calibration)(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_ranges_of_several_batches_are_no_means_of_ranges():
    params, x = {"w": normal(6, 3)}, normal(4, 6)
    calibration = jopt.calibrate(matmul, params, [x, 3 * x, x / 2], progress=False)
    (ends,) = (pair[0] for pair in calibration.activations.values())
    np.testing.assert_allclose(ends.high, 3 * jnp.abs(x).max(), rtol=1e-6)


# Four bits times four bits, which XLA cannot multiply on a CPU as int4.


def test_four_bits_by_four_bits():
    params, x = {"w": normal(16, 3)}, normal(4, 16)
    packed = jopt.quantize(params, INT4, sites=jopt.sites(matmul, params, x))
    run = jopt.execute(matmul, activations=INT4)
    assert int_products(run, packed, x) == (1, 1)
    want = jopt.fake_quantize(matmul, INT4, activations=INT4)(params, x)
    np.testing.assert_allclose(run(packed, x), want, rtol=1e-5)


def test_four_bits_by_four_bits_train_with_gradients_of_eight():
    params, x, y = {"w": normal(16, 3)}, normal(32, 16), normal(32, 3)
    qat = jopt.fake_quantize(
        matmul,
        INT4,
        activations=INT4,
        gradients=INT8,
        gradient_rounding=jopt.rounding.stochastic,
        begin_step=10,
    )

    @jax.jit
    def step(params, count):
        key = jax.random.fold_in(jax.random.key(0), count)
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean((qat(p, x, step=count, key=key) - y) ** 2)
        )(params)
        return jax.tree.map(lambda w, g: w - 0.3 * g, params, grads), loss

    losses = []
    for count in range(80):
        params, loss = step(params, count)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


# No masks, no schedules, no learned scales beside a quantized function.


def test_pruned_and_quantized_training_with_learned_ranges():
    import optax

    qat, init_ranges = jopt.fake_quantize(
        matmul, INT4, activations=INT4, ranges="learned"
    )
    params, x, y = {"w": normal(8, 4)}, normal(32, 8), normal(32, 4)
    trained = (params, init_ranges(params, x))
    tx = optax.partition(
        {"w": jopt.prune(optax.adam(1e-2), sparsity=0.5), "r": optax.adam(1e-2)},
        ({"w": "w"}, jax.tree.map(lambda _: "r", trained[1])),
    )
    state = tx.init(trained)

    @jax.jit
    def step(trained, state):
        loss, grads = jax.value_and_grad(
            lambda t: jnp.mean((qat(t[0], x, ranges=t[1]) - y) ** 2)
        )(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    losses = []
    for _ in range(60):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert min(losses[-5:]) < losses[1]
    assert jnp.count_nonzero(trained[0]["w"]) == 16
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), trained[1], init_ranges(params, x)
    )
    assert all(jax.tree.leaves(moved))


def test_only_a_missing_lowering_falls_back(monkeypatch):
    """An error inside the microscaled product is an error, and no other path."""
    from jopt.programs import compat

    spec = jopt.QuantSpec(jopt.formats.mxfp8)
    params, x = {"w": normal(32, 3)}, normal(4, 32)
    packed = jopt.quantize(params, spec, sites=jopt.sites(matmul, params, x))

    def broken(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(compat, "has_scaled_matmul", lambda: True)
    monkeypatch.setattr(jax.nn, "scaled_matmul", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        jopt.execute(matmul, activations=spec)(packed, x)
