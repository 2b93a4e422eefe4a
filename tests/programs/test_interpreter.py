"""What is written down again runs as it did: batches, platforms, devices, flags."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jopt
from jopt.programs import compat
from jopt.programs.interpret import rewrite
from tests.programs.zoo_model import draw

IDENTITY = jopt.Handler(lambda use: use.run(), select=lambda site: True)
LARGEST = jopt.Handler(
    lambda use: (use.run(), jnp.max(jnp.abs(use.x))),
    initial=lambda site: jnp.float32(0),
    merge=jnp.maximum,
)


def assert_same(apply, params, *inputs):
    same = rewrite(apply, IDENTITY)(params, *inputs)
    np.testing.assert_array_equal(same, jax.jit(apply)(params, *inputs))


def test_a_while_loop_over_a_batch_stops_each_example_by_itself():
    def apply(params, x):
        def grow(row):
            return lax.while_loop(
                lambda s: jnp.sum(jnp.abs(s)) < 10,
                lambda s: s + jnp.abs(s @ params["w"]) + 0.1,
                row,
            )

        return jax.vmap(grow)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    assert_same(apply, draw({"w": (3, 3)}), x * jnp.arange(5)[:, None])


def test_a_branch_for_a_platform_is_chosen_when_compiled():
    def apply(params, x):
        def broken(x):
            raise_it = lambda _: np.full((2, 3), np.nan, np.float32)  # noqa: E731
            return jax.pure_callback(raise_it, jax.typeof(x), x) @ params["w"]

        return lax.platform_dependent(
            x, cpu=lambda x: x @ params["w"], default=lambda x: broken(x)
        )

    assert_same(apply, draw({"w": (3, 3)}), jnp.ones((2, 3)))


def sharded(mesh):
    def product(w, x):
        return jax.shard_map(
            lambda w, x: jnp.tanh(x @ w),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )(w, x)

    return product


@pytest.mark.parametrize("loop", ["cond", "while", "scan", "in_shard_map"])
def test_aux_of_devices_inside_branches_and_loops(auto_mesh, loop):
    product = sharded(auto_mesh)

    def apply(params, x, flag):
        w = params["w"]
        if loop == "cond":
            return lax.cond(flag, lambda x: product(w, x), lambda x: x, x)
        if loop == "while":
            return lax.fori_loop(0, flag + 1, lambda i, x: product(w, x), x)
        if loop == "scan":
            return lax.scan(lambda x, _: (product(w, x), None), x, length=2)[0]

        def inside(w, x):
            x = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)[0]
            x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w), x)
            return lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x, x)

        return jax.shard_map(
            inside, mesh=auto_mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )(w, x)

    params, x = draw({"w": (3, 3)}), jnp.arange(24.0).reshape(8, 3)
    out, aux = rewrite(apply, LARGEST)(params, x, 1)
    np.testing.assert_array_equal(out, jax.jit(apply)(params, x, 1))
    assert aux["w"].shape == (8,)
    np.testing.assert_array_equal(aux["w"], x.max(axis=1))


def test_steps_of_time_are_merged_and_layers_are_stacked():
    def apply(params, xs):
        def step(h, x):
            h = lax.scan(lambda h, w: (jnp.tanh(h @ w + x), None), h, params["layers"])[
                0
            ]
            return h @ params["out"], None

        return lax.scan(step, jnp.zeros((2, 3)), xs)[0]

    params, xs = draw({"layers": (4, 3, 3), "out": (3, 3)}), jnp.ones((6, 2, 3))
    _, aux = rewrite(apply, LARGEST)(params, xs)
    assert {name: value.shape for name, value in aux.items()} == {
        "layers": (4,),
        "out": (),
    }
    unmerged = jopt.Handler(LARGEST.call, initial=LARGEST.initial)
    _, aux = rewrite(apply, unmerged)(params, xs)
    assert {name: value.shape for name, value in aux.items()} == {
        "layers": (6, 4),
        "out": (6,),
    }
    recording = jopt.record(
        apply, params, [xs, jnp.ones((9, 2, 3))], jopt.statistics.gram(), progress=False
    )
    rows = {name: value["rows"].tolist() for name, value in recording.values.items()}
    assert rows == {"layers": [30.0] * 4, "out": 30.0}


def test_a_sequence_of_any_length_runs_at_the_ranges_of_another():
    def apply(params, xs):
        step = lambda h, x: (jnp.tanh(x @ params["w"] + h), h)  # noqa: E731
        return lax.scan(step, jnp.zeros((2, 3)), xs)[1]

    params, int8 = draw({"w": (4, 3)}), jopt.QuantSpec(jopt.formats.int8)
    xs = [jnp.ones((n, 2, 4)) * n for n in (5, 7)]
    calibration = jopt.calibrate(apply, params, xs)
    assert float(calibration.activations["w"][0].high) == 7
    packed = jopt.quantize(params, calibration)
    run = jopt.execute(apply, activations=calibration)
    assert run(packed, jnp.ones((3, 2, 4))).shape == (3, 2, 3)
    qat, init = jopt.fake_quantize(apply, int8, activations=int8, ranges="learned")
    ranges = init(params, xs[0])
    grads = jax.grad(lambda r: qat(params, xs[1], ranges=r).sum())(ranges)
    assert grads.activations["w"][0].high.shape == ()


class Layer(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x, scale=1, *, train=False, mode="sum", act=None):
        x = self.linear(x) * scale if train else x[:, :3]
        x = x if act is None else act(x)
        return getattr(x, mode)()


def test_flags_strings_and_functions_are_static():
    apply, params = jopt.functional(Layer())
    x, calls = jnp.ones((2, 4)), {"train": True, "mode": "mean", "act": jnp.tanh}
    assert jopt.sites(apply, params, x, **calls).names == ("linear/kernel",)
    assert jopt.sites(apply, params, x).names == ()
    same = rewrite(apply, IDENTITY)
    for call in (calls, {}, {**calls, "mode": "max"}):
        np.testing.assert_allclose(same(params, x, **call), apply(params, x, **call))
        np.testing.assert_allclose(
            jax.jit(functools.partial(same, **call))(params, x, 2),
            apply(params, x, 2, **call),
            rtol=1e-6,
        )
    int8 = jopt.QuantSpec(jopt.formats.int8)
    packed = jopt.quantize(params, int8, sites=jopt.sites(apply, params, x, **calls))
    qat = jopt.fake_quantize(apply, int8, activations=int8)(params, x, **calls)
    run = jopt.execute(apply, activations=int8)(packed, x, **calls)
    np.testing.assert_allclose(run, qat, rtol=1e-5)
    with pytest.raises(TypeError, match="hashable values, got one of type set"):
        same(params, x, train={1})


def test_what_python_needs_the_value_of_says_how_to_bind_it():
    apply = lambda params, x, n: sum(x @ params["w"] for _ in range(n))  # noqa: E731
    with pytest.raises(ValueError, match=r"functools\.partial"):
        jopt.sites(apply, draw({"w": (3, 3)}), jnp.ones((2, 3)), 2)


def test_inside_jit_nothing_is_wrapped():
    """A call in the program may change what XLA copies."""
    params, x = draw({"w": (3, 3)}), jnp.ones((2, 3))
    same = rewrite(lambda params, x: x @ params["w"], IDENTITY)
    names = [e.primitive.name for e in jax.make_jaxpr(same)(params, x).eqns]
    assert names == ["dot_general"]
    assert compat.is_staged is not None and not compat.is_staged((params, x))


def test_settings_around_an_equation_are_kept():
    def apply(params, x):
        with jax.default_matmul_precision("highest"):
            x = x @ params["w"]
        return lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    params = draw({"w": (3, 3), "layers": (2, 3, 3)})
    text = [
        jax.jit(f).lower(params, jnp.ones((2, 3))).as_text().count("HIGHEST")
        for f in (apply, rewrite(apply, IDENTITY))
    ]
    assert text[0] == text[1] > 0


def test_many_threads_look_at_many_functions():
    params, x, errors = draw({"w": (3, 3)}), jnp.ones((2, 3)), []

    def look(k):
        try:
            for i in range(20):
                f = lambda p, x, i=i: x @ p["w"] + i + k  # noqa: E731
                assert jopt.sites(f, params, x).names == ("w",)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_no_tracer_outlives_its_trace():
    def run(params, x, s):
        return rewrite(lambda params, x: x @ params["w"] * s, IDENTITY)(params, x)

    with jax.checking_leaks():
        jax.jit(run)(draw({"w": (3, 3)}), jnp.ones((2, 3)), 2.0)
