"""One line from a module to a pure function, in every framework."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jopt.programs.counts import sites
from jopt.programs.handlers import IDENTITY
from jopt.programs.interpret import rewrite
from jopt.programs.modules import functional

X = jnp.arange(12.0).reshape(4, 3)


class Net(nnx.Module):
    """A layer, batch statistics and dropout."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))

    def features(self, x):
        return self.dense(x)


class LinenNet(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(4)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


def test_nnx_is_pure_and_the_module_stays_as_it_was():
    module = Net(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(module, nnx.BatchStat)))
    apply, params = functional(module)
    assert sites(apply, params, X).names == ("dense/kernel",)
    eager = apply(params, X)
    np.testing.assert_array_equal(eager, apply(params, X))  # eager, twice
    np.testing.assert_array_equal(
        jax.jit(apply)(params, X), jax.jit(rewrite(apply, IDENTITY))(params, X)
    )
    after = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
    assert all(map(np.array_equal, before, after))
    module.eval()
    apply, params = functional(module)
    np.testing.assert_array_equal(apply(params, X), module(X))
    features, _ = functional(module, method="features")
    np.testing.assert_array_equal(features(params, X), module.dense(X))


def test_nnx_in_training_returns_what_changes():
    apply, params, rest = functional(Net(nnx.Rngs(0)), mutable=True)
    first, rest_1 = jax.jit(apply)(params, rest, X)
    second, rest_2 = jax.jit(apply)(params, rest_1, X)
    assert not np.array_equal(first, second)  # dropout goes on
    means = [np.asarray(r["norm"]["mean"][...]) for r in (rest, rest_1, rest_2)]
    assert not np.array_equal(means[0], means[1])
    assert not np.array_equal(means[1], means[2])
    assert jax.tree.structure(rest) == jax.tree.structure(rest_1)

    def loss(params, rest):
        out, rest = apply(params, rest, X)
        return jnp.mean(out**2), rest

    grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, rest)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_linen_takes_its_variables_and_returns_its_collections():
    net = LinenNet()
    variables = net.init(jax.random.key(0), X)
    apply, params = functional(net, variables)
    np.testing.assert_array_equal(apply(params, X), net.apply(variables, X))
    assert sites(apply, params, X).names == ("Dense_0/kernel",)
    apply, params, rest = functional(net, variables, mutable=True)
    rngs = {"dropout": jax.random.key(1)}
    out, changed = apply(params, rest, X, train=True, rngs=rngs)
    assert out.shape == (4, 4) and changed.keys() == rest.keys() == {"batch_stats"}
    assert not np.array_equal(
        changed["batch_stats"]["BatchNorm_0"]["mean"],
        rest["batch_stats"]["BatchNorm_0"]["mean"],
    )


def test_equinox_and_other_callable_pytrees_are_their_own_params():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    apply, params = functional(mlp)
    batched = jax.vmap(apply, (None, 0))
    np.testing.assert_array_equal(batched(params, X), jax.vmap(mlp)(X))
    assert sites(batched, params, X).names == ("layers/0/weight", "layers/1/weight")
    assert all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))
    grads = jax.grad(lambda p: batched(p, X).sum())(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda: functional(lambda p, x: x), TypeError, "needs no adapter"),
        (lambda: functional(LinenNet), TypeError, "module must be"),
        (lambda: functional(LinenNet()), ValueError, "needs variables with 'params'"),
        (lambda: functional(Net(nnx.Rngs(0)), {"params": 1}), ValueError, "Linen"),
        (
            lambda: functional(
                eqx.nn.Linear(2, 2, key=jax.random.key(0)), mutable=True
            ),
            ValueError,
            "takes its state as an input",
        ),
    ],
)
def test_what_does_not_fit_says_so(arguments, error, message):
    with pytest.raises(error, match=message):
        arguments()


def test_a_function_that_is_not_pure_names_the_fix():
    module = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    with pytest.raises(ValueError, match=r"must be pure.*jopt\.functional"):
        sites(lambda params, x: nnx.merge(graph, params, rest)(x), params, X)
