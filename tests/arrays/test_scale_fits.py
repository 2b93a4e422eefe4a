"""Fitted scales, against searches in NumPy; never worse than those of the range."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from jopt import scale_fits
from jopt.arrays.codes import compute_codes, decode
from jopt.arrays.scales import Scale, compute_range, compute_scale
from tests.quantization.by_hand import all_codes, gptq_by_hand

F = jopt.formats
SPECS = [
    jopt.QuantSpec(F.int3, group_size=16),
    jopt.QuantSpec(F.uint2, symmetric=False, group_size=32),
    jopt.QuantSpec(F.int4, symmetric=False, scale_dtype=jnp.float32),
    jopt.QuantSpec(F.nf4, axis=()),
    jopt.QuantSpec(F.ternary),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
FITS = {"half_quadratic": (scale_fits.half_quadratic(), 0.7)}
FITS["least_error"] = (scale_fits.least_error(norm=2.0), 2.0)
every_fit = pytest.mark.parametrize("name", FITS)


def run(fit, w, spec):
    """Compiled once per fit, spec and shape."""
    return jax.jit(fit, static_argnums=1)(w, spec)


def heavy(*shape, seed=0):
    w = np.random.default_rng(seed).standard_t(3, size=shape)
    return jnp.asarray(w, jnp.float32)


def losses(w, scale, spec, norm):
    """Each group's sum |w - q|^norm, in float64."""
    values = decode(compute_codes(w, scale, spec), scale, spec)
    lost = np.abs(np.asarray(w, np.float64) - np.asarray(values)) ** norm
    kept = scale.scale.shape
    sizes = [(k, n // k) for n, k in zip(w.shape, kept, strict=True)]
    return lost.reshape(sum(sizes, ())).sum(axis=(1, 3))


@every_spec
@every_fit
def test_no_group_is_worse_than_by_its_range(spec, name):
    fit, norm = FITS[name]
    w = heavy(32, 6)
    simple = compute_scale(*compute_range(w, spec), spec)
    found = run(fit, w, spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), simple
    )
    mine, theirs = (losses(w, scale, spec, norm) for scale in (found, simple))
    assert np.all(mine <= theirs * (1 + 1e-5))
    q = jopt.quantize(w, spec, fit=fit)
    np.testing.assert_array_equal(
        q.to_array(), decode(compute_codes(w, found, spec), found, spec)
    )


@every_fit
def test_heavy_tails_lose_clearly_less(name):
    w, spec = heavy(256, 16), jopt.QuantSpec(F.int3, group_size=64)
    simple = compute_scale(*compute_range(w, spec), spec)
    found = run(FITS[name][0], w, spec)
    for norm, most in ((FITS[name][1], 0.9), (2.0, 1.0)):
        mine, theirs = (losses(w, s, spec, norm).sum() for s in (found, simple))
        assert mine < most * theirs


def test_least_error_is_the_best_share_of_a_search_by_hand():
    w = heavy(24, 5)
    spec = jopt.QuantSpec(F.int3, group_size=8)
    fit = scale_fits.least_error(norm=2.0, num_shares=9, smallest=0.6)
    found = run(fit, w, spec)
    groups = np.asarray(w, np.float64).reshape(3, 8, 5)
    for share in np.linspace(1, 0.6, 9).astype(np.float32):
        scale = np.abs(np.asarray(w).reshape(3, 8, 5)).max(1) * share / np.float32(3)
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
        codes = np.clip(np.rint(groups / scale[:, None]), -3, 3)
        lost = np.sum((groups - codes * scale[:, None]) ** 2, 1)
        assert np.all(losses(w, found, spec, 2.0) <= lost * (1 + 1e-5))


@every_fit
def test_the_size_of_the_weights_does_not_matter(name):
    w, spec = heavy(32, 6), SPECS[0]
    one = run(FITS[name][0], w, spec)
    for factor in (2.0**-90, 2.0**90):
        other = run(FITS[name][0], w * factor, spec)
        np.testing.assert_array_equal(
            np.asarray(one.scale, np.float32) * np.float32(factor),
            np.asarray(other.scale, np.float32),
        )


def test_groups_of_zeros_and_of_no_numbers_keep_the_scales_of_rounding():
    w = heavy(32, 6).at[:, 0].set(0.0).at[:, 1].set(jnp.nan)
    for spec in SPECS[:2]:
        simple = compute_scale(*compute_range(w, spec), spec)
        for fit, _ in FITS.values():
            found = run(fit, w, spec)
            for pair in zip(*map(jax.tree.leaves, (found, simple)), strict=True):
                kept = [np.asarray(x[:, :2], np.float32) for x in pair]
                np.testing.assert_array_equal(*kept)


def test_gptq_fits_the_scales_of_weights_as_they_are_by_then():
    """A fit of our own, by hand in the reference too: ranges cut to 0.8."""

    def fit(w, spec):
        low, high = compute_range(w, spec)
        return compute_scale(0.8 * low, 0.8 * high, spec)

    x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    params = {"w": heavy(16, 4)}
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    for spec in (jopt.QuantSpec(F.int3, group_size=8), jopt.QuantSpec(F.int3)):
        packed, _ = jopt.gptq(apply, params, [x], spec, fit=fit, progress=False)
        w = np.asarray(params["w"])
        expected, _ = gptq_by_hand(w, x.T @ x, all_codes(spec), shares=[0.8])
        np.testing.assert_allclose(packed["w"].to_array(), expected, atol=1e-5)
        simple, _ = jopt.rtn(apply, params, [x], spec, fit=fit, progress=False)
        own = jopt.quantize(params["w"], all_codes(spec), fit=fit)
        np.testing.assert_array_equal(simple["w"].to_array(), own.to_array())


def test_searched_ranges_help_gptq_in_few_bits():
    x = np.random.default_rng(1).normal(size=(256, 32)).astype(np.float32)
    params, spec = {"w": heavy(32, 16)}, jopt.QuantSpec(F.int3, group_size=16)
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    for method in (jopt.rtn, jopt.gptq, jopt.adaround):
        options = {"num_steps": 200} if method is jopt.adaround else {}
        fits = (
            scale_fits.by_range,
            scale_fits.least_error(),
            scale_fits.by_squared_error,
        )
        plain, fine, coarse = (
            method(apply, params, [x], spec, fit=fit, progress=False, **options)[1]["w"]
            for fit in fits
        )
        assert max(fine.error, coarse.error) < 0.9 * plain.error


def test_on_a_mesh_scales_are_those_of_one_device(explicit_mesh, auto_mesh):
    w, spec = heavy(32, 16), jopt.QuantSpec(F.int4, group_size=8)
    for mesh in (explicit_mesh, auto_mesh):
        where = NamedSharding(mesh, PartitionSpec(None, "data"))
        for fit, _ in FITS.values():
            alone = jopt.quantize(w, spec, fit=fit)
            split = jopt.quantize(jax.device_put(w, where), spec, fit=fit)
            np.testing.assert_array_equal(split.scale, alone.scale)
            np.testing.assert_array_equal(split.codes, alone.codes)


def test_wrong_arguments_raise_and_equal_ones_give_one_fit():
    assert scale_fits.least_error(norm=2.0) is scale_fits.least_error(norm=2.0)
    w, spec = heavy(32, 4), jopt.QuantSpec(F.nvfp4)
    for match, call in {
        "norm must be above 0, got 0": lambda: scale_fits.least_error(norm=0),
        "num_shares must be an integer of at least 1, got 0": lambda: (
            scale_fits.least_error(num_shares=0)
        ),
        r"smallest must be in \(0, 1\], got 2": lambda: scale_fits.least_error(
            smallest=2
        ),
        "beta and kappa must be above 0, got beta=0, kappa=1": lambda: (
            scale_fits.half_quadratic(beta=0, kappa=1)
        ),
        "shrink one by one, got nvfp4": lambda: jopt.quantize(
            w, spec, fit=scale_fits.least_error()
        ),
        "free to choose scales, got nvfp4, whose scales are float8_e4m3fn": lambda: (
            jopt.quantize({"w": w}, spec, fit=scale_fits.half_quadratic())
        ),
        "fit must be None where scales are given": lambda: jopt.quantize(
            w, SPECS[0], scales=Scale(jnp.ones((2, 4))), fit=scale_fits.by_range
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
