"""The interpreter changes what a handler asks for, and nothing else."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jopt.arrays.compressed import CompressedArray
from jopt.programs.counts import sites
from jopt.programs.handlers import IDENTITY, Handler, to_array
from jopt.programs.interpret import rewrite
from tests.programs import zoo

EVERY_SITE = Handler(IDENTITY.call, select=lambda site: True)
DOUBLED = Handler(lambda use: use.run(weight=to_array(use.weight) * 2))


def operations(compiled):
    found = re.findall(r"^\s*(?:ROOT )?\S+ = \S+ ([\w-]+)\(", compiled.as_text(), re.M)
    return collections.Counter(found)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_identity_is_the_same_program_with_the_same_bits(name):
    """Values, gradients, and the operations of the optimized HLO."""
    model = zoo.ZOO[name]()
    same = dataclasses.replace(model, apply=rewrite(model.apply, EVERY_SITE))
    compiled = []
    for m in (model, same):
        f = functools.partial(zoo.loss, m)
        if name != "while":  # a while loop has no reverse mode
            f = jax.value_and_grad(f)
        compiled.append(jax.jit(f).lower(m.params, *m.inputs).compile())
    assert_equal(*[c(model.params, *model.inputs) for c in compiled])
    assert operations(compiled[0]) == operations(compiled[1])


@pytest.mark.parametrize(
    "name", ["mlp", "linen_cnn", "nnx_transformer", "cond", "while"]
)
def test_a_handler_reaches_every_site_that_it_selects(name):
    """Doubling the weights at the sites is doubling the leaves that only feed sites."""
    model = zoo.ZOO[name]()
    paths = set(weights := model.weights) - model.uncovered
    doubled = rewrite(model.apply, DOUBLED)(model.params, *model.inputs)
    flat, treedef = jax.tree.flatten_with_path(model.params)
    leaves = sites(model.apply, model.params, *model.inputs).leaves
    assert {name.partition("#")[0] for name in weights} <= set(leaves) and paths
    params = treedef.unflatten(
        [
            leaf if path in model.uncovered else leaf * 2
            for path, (_, leaf) in zip(leaves, flat, strict=True)
        ]
    )
    expected = jax.jit(model.apply)(params, *model.inputs)
    for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def mlp():
    model = zoo.ZOO["mlp"]()
    return model.apply, model.params, model.inputs[0]


def test_it_works_under_jit_grad_vmap_and_scan():
    apply, params, x = mlp()
    same = rewrite(apply, EVERY_SITE)
    assert_equal(jax.jit(same)(params, x), jax.jit(apply)(params, x))
    batch = jnp.stack([x, x + 1, x - 1])
    assert_equal(
        jax.jit(jax.vmap(same, (None, 0)))(params, batch),
        jax.jit(jax.vmap(apply, (None, 0)))(params, batch),
    )
    step = lambda f: lambda c, x: (c + jnp.sum(f(params, x)), None)  # noqa: E731
    assert_equal(
        lax.scan(step(same), 0.0, batch)[0], lax.scan(step(apply), 0.0, batch)[0]
    )
    hessian = [
        jax.jit(jax.jacfwd(jax.grad(lambda x, f=f: jnp.sum(f(params, x)))))(x)
        for f in (apply, same)
    ]
    assert_equal(*hessian)


def test_keywords_and_structure_go_through():
    def apply(params, x, *, scale):
        return {"y": x @ params["w"] * scale, "n": (x.sum(), 3)}

    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    same = rewrite(apply, EVERY_SITE)
    assert_equal(same(params, x, scale=2.0), jax.jit(apply)(params, x, scale=2.0))
    assert same.__name__ == "apply"


def test_tracing_happens_once_per_shape():
    traces, calls = [], []

    def apply(params, x):
        traces.append(x.shape)
        return x @ params["w"]

    def call(use):
        calls.append(use.site.name)
        return use.default(*use.operands)

    same = rewrite(apply, Handler(call))
    params = {"w": jnp.ones((3, 2))}
    for _ in range(3):
        same(params, jnp.ones((4, 3)))
    assert traces == [(4, 3)] and calls == ["w"]
    same(params, jnp.ones((5, 3)))
    assert traces == [(4, 3), (5, 3)] and calls == ["w", "w"]


def test_two_rewrites_of_one_function_do_not_see_each_other():
    """An earlier library leaked quantization through trace caches into float models."""
    apply, params, x = mlp()
    before = jax.jit(apply)(params, x)
    doubled, same = rewrite(apply, DOUBLED), rewrite(apply, EVERY_SITE)
    out = doubled(params, x)
    assert_equal(same(params, x), before)
    assert_equal(jax.jit(apply)(params, x), before)
    assert_equal(doubled(params, x), out)
    assert not np.array_equal(out, before)


def test_profiles_show_the_modules_that_the_function_was_traced_in():
    model = zoo.ZOO["linen_cnn"]()
    names = []
    for f in (model.apply, rewrite(model.apply, EVERY_SITE)):
        text = jax.jit(f).lower(model.params, *model.inputs).compile().as_text()
        found = ";".join(re.findall(r'op_name="([^"]*)"', text))
        found = re.sub(r"/?jit\(\w+\)", "", found).split(";")
        names.append({name.strip("/") for name in found})
    assert names[0] <= names[1] and any("block/norm_1" in name for name in names[0])


def count_runs(use):
    return use.default(*use.operands), {"runs": jnp.int32(1)}


RUNS = Handler(
    count_runs,
    initial=lambda site: {"runs": jnp.int32(0)},
    merge=lambda a, b: jax.tree.map(jnp.add, a, b),
)


def test_aux_is_stacked_in_scans_and_merged_in_while_loops():
    params = {
        "scan": jnp.ones((4, 2, 2)),
        "nested": jnp.ones((2, 2)),
        "once": jnp.ones((2, 2)),
    }

    def apply(params, x, n):
        x, _ = lax.scan(lambda x, w: (x @ w, None), x, params["scan"])

        def body(x, _):
            return lax.fori_loop(0, n, lambda i, x: x @ params["nested"], x), None

        x, _ = lax.scan(jax.checkpoint(body), x, length=3)

        def twice(i, x):
            return lax.scan(lambda x, _: (x @ params["nested"], None), x, length=2)[0]

        x = lax.fori_loop(0, n, twice, x)
        return x @ params["once"]

    x = jnp.ones((1, 2))
    out, aux = rewrite(apply, RUNS)(params, x, 5)
    assert_equal(out, jax.jit(apply)(params, x, 5))
    runs = {name: np.asarray(value["runs"]).tolist() for name, value in aux.items()}
    assert runs == {
        "scan": [1] * 4,
        "nested": 15,  # merged over the loop, and over a scan that has no layers
        "nested#1": 10,
        "once": 1,
    }


def test_aux_of_layers_is_merged_where_the_handler_says_so():
    model = zoo.ZOO["rnn_remat_scan_cond"]()
    merged = dataclasses.replace(RUNS, stacks_layers=False)
    inputs = (model.params, *model.inputs)
    (out, stacked), (again, aux) = (
        rewrite(model.apply, h)(*inputs) for h in (RUNS, merged)
    )
    assert_equal(out, again)
    for name, value in stacked.items():
        assert int(aux[name]["runs"]) == int(value["runs"].sum())


def test_aux_of_a_branch_not_taken_is_initial():
    model = zoo.ZOO["cond"]()
    _, aux = rewrite(model.apply, RUNS)(model.params, *model.inputs)
    runs = {name: int(value["runs"]) for name, value in aux.items()}
    assert set(runs) == set(model.weights)
    assert 0 < sum(runs.values()) < len(runs)


def test_nested_branches_do_not_multiply_the_calls():
    calls = []

    def call(use):
        calls.append(use.site.name)
        return use.default(*use.operands), jnp.int32(1)

    def nest(depth, params, x):
        x = x @ params[depth]
        if depth == 0:
            return x
        return lax.cond(x.sum() > 0, lambda x: nest(depth - 1, params, x), jnp.sin, x)

    params = [jnp.eye(2) for _ in range(5)]
    handler = Handler(call, initial=lambda site: jnp.int32(0))
    rewrite(functools.partial(nest, 4), handler)(params, jnp.ones((1, 2)))
    assert len(calls) <= 2 * len(params)


def test_aux_of_shard_map_is_stacked_over_devices():
    model = zoo.ZOO["shard_map_tp"]()

    def call(use):
        return use.default(*use.operands), jnp.max(jnp.abs(use.x))

    handler = Handler(call, initial=lambda site: jnp.float32(0))
    out, aux = rewrite(model.apply, handler)(model.params, *model.inputs)
    assert_equal(out, jax.jit(model.apply)(model.params, *model.inputs))
    assert all(value.shape == (8,) for value in aux.values())


def test_a_while_loop_needs_a_merge():
    model = zoo.ZOO["while"]()
    handler = dataclasses.replace(RUNS, merge=None)
    with pytest.raises(ValueError, match=r"must have a merge for site '.*'"):
        rewrite(model.apply, handler)(model.params, *model.inputs)


def test_a_result_of_another_shape_raises_and_of_another_dtype_is_cast():
    apply, params, x = mlp()
    wrong = Handler(lambda use: use.default(*use.operands).sum())
    with pytest.raises(ValueError, match="handler must return shape"):
        rewrite(apply, wrong)(params, x)
    low = Handler(lambda use: use.default(*use.operands).astype(jnp.bfloat16))
    assert rewrite(apply, low)(params, x).dtype == jax.jit(apply)(params, x).dtype


@pytest.mark.parametrize("name", ["custom_vjp", "custom_jvp"])
def test_gradient_rules_are_kept_unless_inlined(name):
    model = zoo.ZOO[name]()
    grads = [
        jax.jit(jax.grad(functools.partial(zoo.loss, m)))(m.params, *m.inputs)
        for m in (
            model,
            dataclasses.replace(model, apply=rewrite(model.apply, EVERY_SITE)),
            dataclasses.replace(
                model, apply=rewrite(model.apply, EVERY_SITE, inline_custom_rules=True)
            ),
        )
    ]
    assert_equal(grads[0], grads[1])
    inlined, kept = jax.tree.leaves(grads[2]), jax.tree.leaves(grads[0])
    assert any(not np.allclose(a, b) for a, b in zip(inlined, kept, strict=True))


def test_placement_is_kept_on_automatic_and_explicit_meshes(auto_mesh, explicit_mesh):
    for mesh in (auto_mesh, explicit_mesh):
        place = functools.partial(NamedSharding, mesh)
        params = {
            "w": jax.device_put(jnp.ones((4, 16)), place(PartitionSpec(None, "data")))
        }
        x = jax.device_put(jnp.arange(32.0).reshape(8, 4), place(PartitionSpec()))
        apply = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
        out = jax.jit(rewrite(apply, EVERY_SITE))(params, x)
        expected = jax.jit(apply)(params, x)
        assert_equal(out, expected)
        assert out.sharding.is_equivalent_to(expected.sharding, 2)


def test_inside_a_users_shard_map(auto_mesh):
    """With collectives over the user's axis, as BatchNorm has them."""

    def apply(params, x):
        y = x @ params["w"]
        return y - lax.pmean(y, "data")

    def mapped(f):
        specs = (PartitionSpec(), PartitionSpec("data"))
        return jax.jit(
            jax.shard_map(
                f, mesh=auto_mesh, in_specs=specs, out_specs=PartitionSpec("data")
            )
        )

    params, x = {"w": jnp.ones((4, 3))}, jnp.arange(64.0).reshape(16, 4)
    assert_equal(
        mapped(rewrite(apply, EVERY_SITE))(params, x), mapped(apply)(params, x)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves(CompressedArray):
    """Stands for twice its child, and keeps stacked layers apart."""

    half: jax.Array
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return self.half.shape

    def to_array(self):
        return (2 * self.half).astype(self.dtype)


@pytest.mark.parametrize(
    "name",
    [
        "mlp", "linen_cnn", "linen_transformer", "nnx_transformer", "equinox_mlp",
        "gqa", "lora", "split", "moe_ragged", "cond", "while", "rnn_remat_scan_cond",
        "custom_vjp", "shard_map_tp", "hyper", "indexed_layers",
    ],
)  # fmt: skip
def test_compressed_leaves_are_always_right(name):
    """At sites, in loops, in opaque calls, and where no site takes them."""
    model = zoo.ZOO[name]()
    halves = jax.tree.map(lambda w: Halves(w / 2, np.dtype(w.dtype)), model.params)
    expected = jax.jit(model.apply)(model.params, *model.inputs)
    out = rewrite(model.apply, IDENTITY)(halves, *model.inputs)
    assert_equal(out, expected)


def test_compressed_layers_are_sliced_by_a_scan_compressed():
    model = zoo.ZOO["stacked_scan"]()
    halves = jax.tree.map(lambda w: Halves(w / 2, np.dtype(w.dtype)), model.params)

    def call(use):
        assert isinstance(use.weight, Halves)
        return use.run(weight=2 * use.weight.half)

    out = rewrite(model.apply, Handler(call))(halves, *model.inputs)
    assert_equal(out, jax.jit(model.apply)(model.params, *model.inputs))
