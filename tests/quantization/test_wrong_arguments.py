"""Wrong arguments raise one sentence that names them and what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

INT4 = jopt.QuantSpec(jopt.formats.int4)
PARAMS = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}
X = jnp.eye(8)
NAN = float("nan")


def apply(params, x):
    return x @ params["w"]


def of_layers(method, **options):
    return getattr(jopt, method)(apply, PARAMS, [X], INT4, progress=False, **options)


def weights(**options):
    return jopt.quantize_weights(optax.sgd(0.1), INT4, **options)


def importance(value):
    return jopt.cluster(PARAMS, 4, importance={"w": PARAMS["w"].at[0, 0].set(value)})


LAYERS = [
    ("gptq", {"damping": "x"}, TypeError, "damping must be a number, got 'x'"),
    ("gptq", {"damping": NAN}, ValueError, "damping must be at least 0 and finite"),
    ("gptq", {"block_size": 1.5}, ValueError, "block_size must be an integer of .*1.5"),
    ("gptq", {"activation_order": "no"}, TypeError, "activation_order must be True or"),
    ("gptq", {"static_groups": 1}, TypeError, "static_groups must be True or"),
    ("gptq", {"correction": "a"}, TypeError, "correction must be a number, got 'a'"),
    ("rtn", {"correction": True}, TypeError, "correction must be a number, got True"),
    (
        "rtn",
        {"correction": NAN},
        ValueError,
        r"must be in \[0, 1\], got nan",
    ),
    ("gptq", {"fit": 3}, TypeError, r"fit must be a function .*got 3; .*least_error"),
    ("rtn", {"fit": 3}, TypeError, r"fit must be a function .*got 3; .*least_error"),
    ("adaround", {"fit": 3}, TypeError, "fit must be a function .*got 3"),
    (
        "gptq",
        {"fit": jopt.scale_fits.least_error},
        TypeError,
        r"fit must be what least_error\(...\) returns, .*scale_fits.least_error\(\)",
    ),
    ("rtn", {"fit": lambda w, s: 3}, TypeError, "fit must return a scale, .*got int"),
    (
        "gptq",
        {"select": {"v": True}},
        ValueError,
        "select must be a tree of bools shaped as params .*got PyTreeDef",
    ),
    (
        "svdquant",
        {"factor_dtype": "foo"},
        ValueError,
        "factor_dtype must be a float dtype, got 'foo'",
    ),
    ("awq", {"clip": "no"}, TypeError, "clip must be True or False, got 'no'"),
    ("awq", {"num_alphas": 1.5}, ValueError, "num_alphas must be an integer of .*1.5"),
    (
        "adaround",
        {"optimizer": 3},
        TypeError,
        r"must be .*jopt.adaround\(\.\.\.",
    ),
    ("adaround", {"strength": "x"}, TypeError, "strength must be a number, got 'x'"),
    ("autoround", {"optimizer": 3}, TypeError, "optimizer must be an Optax .*got 3"),
    ("autoround", {"num_steps": True}, ValueError, "num_steps must be an integer"),
]


@pytest.mark.parametrize(("method", "options", "error", "message"), LAYERS)
def test_of_methods_for_layers(method, options, error, message):
    with pytest.raises(error, match=message) as caught:
        of_layers(method, **options)
    assert "\n" not in str(caught.value)


WEIGHTS = [
    ({"damping": NAN}, ValueError, "damping must be at least 0 and finite, got nan"),
    ({"damping": -1}, ValueError, "damping must be at least 0 and finite, got -1"),
    ({"damping": "x"}, TypeError, "damping must be a number, got 'x'"),
    ({"rounding": "x"}, TypeError, "rounding must be a function .*got 'x'"),
    ({"key": 3}, TypeError, "key must be one PRNG key, got 3"),
    (
        {"scales": "learned", "scale_optimizer": 3},
        TypeError,
        r"scale_optimizer must be an Optax .*got 3; .*scale_optimizer=optax",
    ),
    ({"scale_optimizer": "adam"}, TypeError, "scale_optimizer must be an Optax"),
]


@pytest.mark.parametrize(("options", "error", "message"), WEIGHTS)
def test_of_quantize_weights(options, error, message):
    with pytest.raises(error, match=message) as caught:
        weights(**options)
    assert "\n" not in str(caught.value)


CALLS = [
    (lambda: jopt.projections.parq("x"), TypeError, "softness must be a number"),
    (lambda: jopt.projections.binary_relax(NAN), ValueError, r"in \[0, 1\], got nan"),
    (lambda: jopt.execute(3), TypeError, "apply must be a function .*got 3; jopt.func"),
    (
        lambda: jopt.execute(apply, activations="int8"),
        TypeError,
        r"activations must be a jopt\.QuantSpec, rules .*got 'int8'",
    ),
    (
        lambda: jopt.fake_quantize(apply, jopt.formats.int8),
        TypeError,
        r"spec must be .*got int8; for example jopt\.QuantSpec",
    ),
    (
        lambda: jopt.fake_quantize(apply, INT4, activations=jopt.formats.int8),
        TypeError,
        r"activations must be .*got int8; for example jopt\.QuantSpec",
    ),
    (
        lambda: jopt.fake_quantize(apply, INT4, gradients=jopt.formats.int8),
        TypeError,
        r"gradients must be a jopt\.QuantSpec, rules {pattern: spec} or None, got int8",
    ),
    (lambda: jopt.gptq(3, PARAMS, [X], INT4), TypeError, "apply must be a function"),
    (
        lambda: jopt.gptq(PARAMS, apply, [X], INT4),
        TypeError,
        r"apply must be a function \(params, \*inputs\) -> outputs, got a dict; ",
    ),
    (
        lambda: jopt.gptq(apply, {"w": jnp.ones((8, 8), int)}, [X], INT4),
        ValueError,
        r"'w': int32, no float; print\(jopt.sites",
    ),
    (
        lambda: jopt.quantize(PARAMS, INT4, fit=jopt.scale_fits.half_quadratic),
        TypeError,
        r"call it: fit=jopt.scale_fits.half_quadratic\(\)",
    ),
    (
        lambda: jopt.rotate(apply, PARAMS, X, key=0),
        TypeError,
        "key must be one PRNG key, got 0",
    ),
    (lambda: jopt.quantize(PARAMS, INT4, fit=3), TypeError, "fit must be a function"),
    (
        lambda: jopt.cluster(PARAMS, 4, iterations=-1),
        ValueError,
        "iterations must be an integer of at least 0, got -1",
    ),
    (lambda: jopt.cluster(PARAMS, 4, key=3), TypeError, "key must be one PRNG key"),
    (
        lambda: jopt.cluster(PARAMS, 4, preserve_zeros="no"),
        TypeError,
        "preserve_zeros must be True or False",
    ),
    (lambda: importance(-1.0), ValueError, "importance must be at least 0 .*for 'w'"),
    (lambda: importance(NAN), ValueError, "importance must be at least 0 .*for 'w'"),
    (lambda: importance(np.inf), ValueError, "importance must be .*finite.*for 'w'"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_of_functions(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_known_importance_is_seen_inside_of_jit_and_traced_passes():
    def known(w):
        return jopt.cluster(w, 2, importance=np.full(4, -1.0))

    with pytest.raises(ValueError, match="importance must be at least 0"):
        jax.eval_shape(known, jnp.arange(4.0))
    shape = jax.eval_shape(
        lambda w, h: jopt.cluster(w, 2, importance=h).to_array(), *2 * (jnp.ones(4),)
    )
    assert shape.shape == (4,)
