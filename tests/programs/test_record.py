"""Statistics of the sites: against NumPy, in loops, sharded, streamed and resumed."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from jopt.arrays.axes import named_sharding
from jopt.programs import statistics
from jopt.programs.handlers import Handler
from jopt.programs.interpret import rewrite
from jopt.programs.record import record
from tests.programs import zoo

PRODUCTS = [name for name in zoo.ZOO if name not in ("while", "shard_map_tp")]


def stacked():
    rng = np.random.default_rng(0)
    params = {"layers": rng.normal(size=(3, 4, 4)), "head": rng.normal(size=(4, 2))}
    params = jax.tree.map(jnp.float32, params)

    def apply(params, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return x @ params["head"]

    batches = [jnp.float32(rng.normal(size=(5, 4))) for _ in range(4)]
    return apply, params, batches


def inputs_by_hand(params, x):
    """What meets each layer, and the head."""
    seen = []
    for w in np.asarray(params["layers"]):
        seen.append(x)
        x = np.tanh(x @ w)
    return np.stack(seen), x


def test_ranges_norms_and_grams_are_those_of_numpy():
    apply, params, batches = stacked()
    seen = [inputs_by_hand(params, np.asarray(b)) for b in batches]
    layers = np.concatenate([s[0] for s in seen], axis=1)
    head = np.concatenate([s[1] for s in seen])

    def of(statistic):
        recording = record(apply, params, batches, statistic, progress=False)
        assert int(recording.count) == 4
        return recording.values

    close = np.testing.assert_allclose
    values = of(statistics.absmax())
    close(values["layers"], np.abs(layers).max((1, 2)), rtol=1e-6)
    close(values["head"], np.abs(head).max(), rtol=1e-6)
    values = of(statistics.minmax())
    close(values["layers"]["low"], layers.min((1, 2)), rtol=1e-6)
    close(values["layers"]["high"], layers.max((1, 2)), rtol=1e-6)
    values = of(statistics.norms())
    close(values["layers"]["squares"][:, 0], (layers**2).sum(1), rtol=1e-5)
    assert values["head"]["rows"] == 20
    values = of(statistics.gram())
    expected = np.einsum("lmk,lmj->lkj", layers, layers)
    close(values["layers"]["gram"][:, 0], expected, rtol=1e-5, atol=1e-5)
    values = of(statistics.histogram(-1.0, 1.0, num_bins=10))
    clipped = np.clip(head, -1, 1 - 1e-6)
    close(values["head"], np.histogram(clipped, 10, (-1, 1))[0])
    assert values["layers"].shape == (3, 10)


def test_a_moving_average_starts_at_the_first_batch_and_forgets():
    apply, params, batches = stacked()
    statistic = statistics.moving_average(0.75)
    values = record(apply, params, batches, statistic, progress=False).values
    average = None
    for batch in batches:
        high = inputs_by_hand(params, np.asarray(batch))[1].max()
        average = high if average is None else 0.75 * average + 0.25 * high
    np.testing.assert_allclose(values["head"]["high"], average, rtol=1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gram_matrix_gives_the_norm_of_the_output(name):
    """tr(W^T G W) = ||X W||^2 wherever a leaf multiplies: roles and order are right."""
    model = zoo.ZOO[name]()

    def norm(use):
        out = use.run()
        return out, jnp.sum(jnp.square(out.astype(jnp.float32)))

    def is_product(site):
        return site.kind == "weight" and site.reachable

    squares = Handler(norm, is_product, lambda site: jnp.float32(0), jnp.add)
    _, expected = rewrite(model.apply, squares)(model.params, *model.inputs)
    if not expected:
        return

    def weights(use):
        """The parameter as the matrix that multiplies `input_matrix`."""
        return use.run(), _weight_matrix(use)

    def zeros(site):
        shape = jax.eval_shape(
            lambda w: _weight_matrix(_Blank(site, w)), site.in_shapes[site.operand]
        )
        return jnp.zeros(shape.shape, shape.dtype)

    # A leaf that meets every step of a loop over time is the same in all of them.
    last = lambda a, b: jnp.where(b == 0, a, b)  # noqa: E731
    taken = Handler(weights, is_product, zeros, last)
    _, matrices = rewrite(model.apply, taken)(model.params, *model.inputs)
    recording = record(
        model.apply,
        model.params,
        [model.inputs],
        statistics.gram(),
        select=is_product,
        progress=False,
    )
    tolerance = 2e-2 if name in ("gqa", "scaled") else 1e-4  # bfloat16 in these
    for site, total in expected.items():
        w, gram = matrices[site], recording.values[site]["gram"]
        found = jnp.einsum("...kn,...kl,...ln->...", w, gram, w, precision="highest")
        found = found.sum(-1)  # over batch dimensions
        np.testing.assert_allclose(found, total, rtol=tolerance)


class _Blank:
    def __init__(self, site, weight):
        self.site, self.weight = site, weight


def _weight_matrix(use):
    """[batch, columns, outputs] of a parameter, written naively."""
    w, site = use.weight.astype(jnp.float32), use.site
    if site.primitive == "conv_general_dilated":
        out, *contracted = site.params["dimension_numbers"].rhs_spec
        groups = site.params["feature_group_count"]
        w = jnp.moveaxis(w, out, -1)
        contracted = w.size // w.shape[-1]
        w = w.reshape(contracted, groups, -1)
        return jnp.moveaxis(w, 1, 0)
    if site.primitive == "dot_general":
        contracted, batch = site.params["dimension_numbers"]
        contracted, batch = contracted[site.operand], batch[site.operand]
    else:
        numbers = site.params["ragged_dot_dimension_numbers"]
        contracted = numbers.dot_dimension_numbers[0][1]
        batch = numbers.rhs_group_dimensions
    contracted = sorted(contracted)
    out = [a for a in range(w.ndim) if a not in (*contracted, *batch)]
    shape = [
        int(np.prod([w.shape[a] for a in axes])) for axes in (batch, contracted, out)
    ]
    return jnp.transpose(w, (*batch, *contracted, *out)).reshape(shape)


def test_a_recording_goes_on_where_it_ended_and_streams(tmp_path):
    apply, params, batches = stacked()
    statistic = statistics.gram()
    whole = record(apply, params, iter(batches), statistic, progress=False)
    half = record(apply, params, batches[:2], statistic, progress=False)
    jopt.save(tmp_path / "half", half)
    restored = jopt.restore(tmp_path / "half")
    assert isinstance(restored, jopt.Recording)
    for start in (half, restored, jax.tree.map(np.asarray, half)):
        rest = (batch for batch in itertools.islice(batches, int(start.count), None))
        again = record(apply, params, rest, statistic, start=start, progress=False)
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, again))
    assert jax.tree.all(jax.tree.map(np.array_equal, half, restored))  # not donated


def test_the_first_batch_runs_the_program_of_all(caplog):
    """Compiled once, and exact where an update does not take the initial value."""
    _, params, batches = stacked()
    mean = statistics.absmax()
    mean = dataclasses.replace(mean, update=lambda a, b: 0.5 * a + 0.5 * b)

    def compilations(batches):
        apply = stacked()[0]  # unknown to every cache
        caplog.clear()
        with jax.log_compiles(True), caplog.at_level("WARNING"):
            recording = record(apply, params, batches, mean, progress=False)
        return recording, caplog.text.count("Finished XLA compilation")

    one, several = compilations(batches[:1]), compilations(batches)
    assert one[1] >= 1
    assert one[1] == several[1]
    seen = [np.abs(inputs_by_hand(params, np.asarray(b))[1]).max() for b in batches]
    np.testing.assert_allclose(one[0].values["head"], seen[0], rtol=1e-6)
    average = seen[0] / 8 + seen[1] / 8 + seen[2] / 4 + seen[3] / 2
    np.testing.assert_allclose(several[0].values["head"], average, rtol=1e-6)


def test_sharded_batches_give_the_statistic_of_the_whole(auto_mesh, explicit_mesh):
    apply, params, _ = stacked()
    batch = jnp.float32(np.random.default_rng(1).normal(size=(16, 4)))
    expected = record(apply, params, [batch], statistics.absmax(), progress=False)
    for mesh in (auto_mesh, explicit_mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        kept = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found = record(apply, kept, [placed], statistics.absmax(), progress=False)
        for name, value in expected.values.items():  # to the rounding of tanh
            np.testing.assert_allclose(found.values[name], value, rtol=1e-6)


EXPLICIT = (jax.sharding.AxisType.Explicit,) * 2
DATA, MODEL = "data", "model"


def _times(params, x):
    # The result is named where the contracted axis is split.
    sharding = named_sharding(x)
    sharding = sharding and sharding.update(spec=PartitionSpec())
    return jnp.einsum("bsi,io->bso", x, params["w"], out_sharding=sharding)


def _conv(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
    )


@pytest.mark.parametrize(
    "apply, kernel, shape, split",
    [
        (_times, (6, 4), (8, 4, 6), (DATA,)),
        (_times, (6, 4), (8, 4, 6), ((DATA, MODEL),)),
        (_times, (6, 4), (8, 4, 6), (DATA, MODEL)),
        (_times, (6, 4), (8, 4, 6), (DATA, None, MODEL)),
        (_conv, (3, 3, 4, 2), (8, 6, 6, 4), (DATA,)),
        (_conv, (3, 3, 4, 2), (8, 6, 6, 4), ((DATA, MODEL),)),
    ],
)
@pytest.mark.parametrize("is_set", [True, False])
def test_explicit_meshes_give_the_statistic_of_one_device(
    apply, kernel, shape, split, is_set
):
    """Of integers exactly, and with nothing of a batch's size gathered."""
    mesh = jax.make_mesh((4, 2), (DATA, MODEL), axis_types=EXPLICIT)
    rng = np.random.default_rng(2)
    params = {"w": jnp.float32(rng.normal(size=kernel))}
    x = jnp.float32(rng.integers(-4, 5, size=shape))
    whole = NamedSharding(mesh, PartitionSpec())
    kept = jax.device_put(params, whole)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*split)))
    for statistic in (
        statistics.gram(),
        statistics.norms(),
        statistics.minmax(),
        statistics.histogram(-3.0, 3.0, num_bins=7),
    ):
        alone = record(apply, params, [x, -x], statistic, progress=False)
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            spread = record(apply, kept, [placed, -placed], statistic, progress=False)
        jax.tree.map(np.testing.assert_array_equal, spread, alone)
        assert all(v.sharding.is_fully_replicated for v in jax.tree.leaves(spread))


def test_no_batch_is_gathered_for_a_gram_matrix():
    mesh = jax.make_mesh((4, 2), (DATA, MODEL), axis_types=EXPLICIT)
    sharding = NamedSharding(mesh, PartitionSpec(DATA, MODEL))
    x = jax.ShapeDtypeStruct((8, 4, 6), jnp.float32, sharding=sharding)
    w = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    for statistic in (statistics.gram(), statistics.histogram(-3.0, 3.0)):
        handler = Handler(
            lambda use, s=statistic: (use.run(), s.summarize(use)),
            initial=statistic.initial,
            merge=statistic.merge,
        )
        run = jax.jit(lambda p, x, h=handler: rewrite(_times, h)(p, x)[1])
        with jax.set_mesh(mesh):
            text = run.lower({"w": w}, x).compile().as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text


@pytest.mark.parametrize(
    "statistic",
    [
        statistics.absmax(),
        statistics.minmax(),
        statistics.moving_average(),
        statistics.norms(),
        statistics.gram(),
        statistics.histogram(-1.0, 1.0),
    ],
)
def test_statistics_are_float32_where_float64_is_on(statistic):
    def apply(params, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ params["w"], lambda: x * 2)

    with jax.enable_x64(True):
        x = jnp.ones((3, 3), jnp.float32)
        params = {"w": jnp.eye(3, dtype=jnp.float32)}
        values = record(apply, params, [x, -x], statistic, progress=False).values
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype("float32")}


def test_starts_and_batches_of_another_kind_say_so():
    apply, params, batches = stacked()
    kept = statistics.absmax()
    go = lambda *args, **kwargs: record(*args, progress=False, **kwargs)  # noqa: E731
    start = go(apply, params, batches, kept)
    with pytest.raises(ValueError, match=r"start must be a recording of this statist"):
        go(apply, params, batches, statistics.minmax(), start=start)
    with pytest.raises(ValueError, match=r"start must be a recording of this functio"):
        other = lambda params, x: x @ params["w"]  # noqa: E731
        go(other, {"w": params["head"]}, batches, kept, start=start)
    with pytest.raises(ValueError, match=r"got \{'': 'float32\[3\]'\} at 'layers'"):
        layers = params["layers"][:2]
        go(apply, {**params, "layers": layers}, batches, kept, start=start)
    with pytest.raises(TypeError, match=r"start must be a jopt\.Recording or None"):
        go(apply, params, batches, kept, start=start.values)
    for wrong in (jopt.observers.absmax(), statistics.absmax):
        with pytest.raises(TypeError, match=r"statistic must be a jopt\.Statistic"):
            go(apply, params, batches, wrong)
    for wrong in (5, {"x": batches[0]}, "ab"):
        with pytest.raises(TypeError, match=r"batches must be an iterable.*\[batch\]"):
            go(apply, params, wrong, kept)
    with pytest.raises(TypeError, match="got a list of 1; pass tuple"):
        go(apply, params, [[batches[0]]], kept)


def test_what_cannot_be_recorded_says_so():
    apply, params, batches = stacked()
    with pytest.raises(ValueError, match="at least one item"):
        record(apply, params, [], statistics.absmax())
    with pytest.raises(ValueError, match="at least one site, got none of 2"):
        record(apply, params, batches, statistics.absmax(), select=lambda site: False)
    with pytest.raises(ValueError, match="decay"):
        statistics.moving_average(1.0)
    with pytest.raises(ValueError, match="low < high"):
        statistics.histogram(1.0, 1.0)
    model = zoo.ZOO["tied"]()
    with pytest.raises(ValueError, match="a parameter multiplies"):
        record(
            model.apply,
            model.params,
            [model.inputs],
            statistics.gram(),
            select=lambda site: site.kind == "gather",
        )
