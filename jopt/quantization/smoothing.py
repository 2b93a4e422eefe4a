"""SmoothQuant: what is hard to round in the inputs is moved into the weights.

    x W = (x / s) (s W),    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

An input channel j that is much larger than others spoils the range of them all; divided
by s it does not, and the weights, which are easy to round, take the factor up. Products
that read one input share s. Where x is computed from a leaf with one factor per channel
(the scale of a norm, the outputs of the layer before), the factor goes into that leaf
and nothing is left to do as the function runs; elsewhere x is divided where it meets
the weight.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models, arXiv:2211.10438.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.arguments import check_flags, check_share
from jopt.programs import channels, interpret, sites
from jopt.programs.batches import begin, require_targets
from jopt.programs.channels import Group
from jopt.programs.handlers import Handler, Use
from jopt.programs.layer_by_layer import steps_of
from jopt.programs.record import record
from jopt.programs.sites import Analysis
from jopt.programs.spread import as_automatic, automatic, beside
from jopt.programs.targets import Target, blame, find_targets, require_finite
from jopt.quantization import input_factors
from jopt.quantization.factors import (
    change_leaves,
    channel_max,
    divide,
    multiply,
    power_of_two,
    put_back,
    require_floats,
)
from jopt.trees import rules
from jopt.trees.layer_report import LayerReport


@dataclasses.dataclass(frozen=True)
class SmoothedRow:
    """One layer whose inputs are smoothed.

    Attributes:
        name: of the site.
        path: of the leaf that takes the factors up.
        into: "folded" into the leaves named, or "kept" where it runs.
        leaves: paths of the leaves that are divided, joined by commas.
        smallest: of the factors.
        largest: of the factors.
        error: None: the function is what it was.
    """

    name: str
    path: str
    into: str
    leaves: str
    smallest: float
    largest: float
    error: float | None = None

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""
        return {
            "factors": f"{self.into} {self.leaves}".strip(),
            "smallest": f"{self.smallest:.4g}",
            "largest": f"{self.largest:.4g}",
        }


@dataclasses.dataclass(frozen=True, repr=False)
class SmoothingReport(LayerReport[SmoothedRow]):
    """Where the factors of every layer went, and what was left alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Smoothed:
    """A function that divides inputs of sites by their factors.

    Attributes:
        apply: the function that it stands for.
        report: what became of every layer.
    """

    apply: Callable[..., Any]
    report: SmoothingReport

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Run it.

        Args:
            params: `{"params": ..., "input_scales": {site: factors}}`.
            *inputs: of the function.
            **kwargs: of the function.

        Returns:
            What the function returns.
        """
        if not params["input_scales"]:
            return self.apply(params["params"], *inputs, **kwargs)
        return self._run(params, inputs, kwargs)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        def run(params: Any, inputs: Any, kwargs: Any) -> Any:
            values = params["input_scales"]
            analysis = sites.analyse(self.apply, params["params"], inputs, kwargs)
            handler = Handler(_divide, select=lambda site: site.name in values)
            return interpret.evaluate(
                analysis, handler, params["params"], inputs, kwargs, values
            )

        return interpret.compiled_if_eager(run)


def _divide(use: Use) -> jax.Array:
    x = input_factors.divide(use.site, use.x, use.value)
    return use.run(x=x)


def smooth(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    select: rules.Select = None,
    fold: bool = True,
    powers_of_two: bool = False,
    progress: bool = True,
) -> tuple[Smoothed, Any]:
    """Move what is hard to round in the inputs of layers into their weights.

    x W = (x / s) (s W),    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

    The result is a function like any other: `jopt.calibrate(smooth_apply,
    smooth_params, ...)`, `jopt.quantize(smooth_params, spec,
    sites=jopt.sites(smooth_apply, smooth_params, x))`, `jopt.fake_quantize` and
    `jopt.execute(smooth_apply, activations=...)` see inputs that are divided already,
    and multiply codes.

    Args:
        apply: a pure function `apply(params, *inputs)`.
        params: its parameters, any tree of float arrays.
        batches: of inputs, as for `jopt.gptq`; passed over once.
        alpha: in [0, 1]: how much is moved; 1 makes all input channels alike, 0 all
            rows of the weights.
        select: which leaves, as for `jopt.gptq`.
        fold: whether factors go into the leaves before, where the program allows it:
            where every value on the way passes factors on (see `jopt.equalize`), and
            all that reads them is selected.
        powers_of_two: whether factors are rounded to powers of two. Nothing is rounded
            by them then, and the function is the same bit for bit.
        progress: whether to show a bar, if there is a terminal.

    Returns:
        `(smooth_apply, smooth_params)`: the function, whose `report` says of each layer
        whether its factors were folded, and into what, or kept, and what was left
        alone; and `{"params": ..., "input_scales": {site: s}}`. Where nothing was kept,
        `apply(smooth_params["params"], ...)` is the same.

    Raises:
        TypeError: `batches` are no inputs, or `alpha` is no number.
        ValueError: `alpha` is not in [0, 1], a leaf is compressed, there is no batch or
            nothing to smooth, or weights or inputs are not finite.

    References:
        Xiao et al., SmoothQuant, arXiv:2211.10438.

    >>> import jopt
    >>> apply = lambda params, x: (x * params["scale"][None]) @ params["w"]
    >>> params = {"scale": jnp.ones(2), "w": jnp.ones((2, 1))}
    >>> smooth_apply, smooth_params = smooth(apply, params, [jnp.array([[16.0, 1.0]])])
    >>> smooth_params["params"]["scale"], smooth_params["params"]["w"].ravel()
    (Array([0.25, 1.  ], dtype=float32), Array([4., 1.], dtype=float32))
    """
    check_share("alpha", alpha, "0.5 is usual")
    require_floats(params)
    check_flags(fold=fold, powers_of_two=powers_of_two, progress=progress)
    batches, analysis = begin("smooth", apply, params, batches)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    goals = [True] * len(leaves)
    targets, left = find_targets(
        analysis.table, params, goals, select, without_goal="it is not selected"
    )
    targets, left = input_factors.without_devices(targets, left)
    require_targets("smooth", "smooth", targets, left)
    require_finite(targets, leaves)
    names = {site.name for target in targets for site, _ in target.uses}
    recording = record(
        apply,
        params,
        batches,
        input_factors.largest_inputs(),
        select=lambda site: site.name in names,
        progress=progress,
    )
    groups = channels.find_groups(analysis, params)[0] if fold else []
    with automatic():
        values = jax.tree.map(as_automatic, recording.values)
        seen = [input_factors.of_target(t, values) for t in targets]
        for target, largest in zip(targets, seen, strict=True):
            if not bool(jnp.isfinite(largest).all()):
                raise ValueError(
                    f"inputs of every site must be finite, got NaN or infinity at "
                    f"{target.name!r}; {blame(params)}, or leave it out with select"
                )
        for target, largest in zip(targets, seen, strict=True):
            left |= input_factors.unreached(target, largest)
        before = [as_automatic(leaf) for leaf in leaves]
        work = _Work(analysis, before, targets, seen, alpha, powers_of_two)
        work.fold(groups)
        kept = work.keep(left)
    leaf_of = {site.name: leaves[t.leaf] for t in targets for site, _ in t.uses}
    input_scales = {name: beside(s, leaf_of[name]) for name, s in kept.items()}
    now = put_back(leaves, before, work.leaves)
    order = {site.name: i for i, site in enumerate(analysis.table)}
    rows = tuple(sorted(work.rows, key=lambda row: order[row.name]))
    smoothed = Smoothed(apply, SmoothingReport(rows, left))
    found = {"params": treedef.unflatten(now), "input_scales": input_scales}
    return smoothed, found


class _Work:
    """Params as they are smoothed; factors are made of them as they were."""

    def __init__(
        self,
        analysis: Analysis,
        leaves: list[Any],
        targets: list[Target],
        seen: list[jax.Array],
        alpha: float,
        powers_of_two: bool,
    ) -> None:
        self.analysis = analysis
        self.before = leaves
        self.leaves = leaves
        self.targets = targets
        self.seen = seen
        self.alpha = alpha
        self.powers_of_two = powers_of_two
        self.done: set[int] = set()
        self.rows: list[SmoothedRow] = []

    def factors(self, inputs: jax.Array, weights: jax.Array) -> jax.Array:
        """Compute s; 1 where nothing comes in, or nothing is multiplied by it."""
        is_used = (inputs > 0) & (weights > 0)
        x, w = (jnp.where(is_used, m, 1.0) for m in (inputs, weights))
        s = x**self.alpha / w ** (1 - self.alpha)
        s = jnp.clip(s, 2.0**-60, 2.0**60)
        return power_of_two(s) if self.powers_of_two else s

    def fold(self, groups: list[Group]) -> None:
        """Fold the factors of all layers that a group leads to."""
        names = list(self.analysis.table.leaves)
        # The leaf of a norm is nearer to what it scales than an earlier layer.
        for group in sorted(groups, key=lambda group: group.source is not None):
            readers = [
                i
                for i, target in enumerate(self.targets)
                if {site.name for site, _ in target.uses} & set(group.sites)
            ]
            read = {site.name for i in readers for site, _ in self.targets[i].uses}
            leaves = {self.targets[i].leaf for i in readers}
            is_whole = read == set(group.sites)
            is_whole &= leaves == {link.leaf for link in group.read}
            if not is_whole or self.done & set(readers):
                continue
            inputs = weights = jnp.zeros(group.size, jnp.float32)
            for link in group.read:
                wide = channel_max(self.before[link.leaf], link, group.size)
                weights = jnp.maximum(weights, wide)
                for i in readers:
                    if self.targets[i].leaf == link.leaf:
                        shape = self.before[link.leaf].shape
                        x = input_factors.to_leaf(
                            self.seen[i], self.targets[i].layout, shape
                        )
                        here = channel_max(x, link, group.size)
                        inputs = jnp.maximum(inputs, here)
            s = self.factors(inputs, weights)
            self.leaves = change_leaves(divide, self.leaves, group.made, s)
            self.leaves = change_leaves(multiply, self.leaves, group.read, s)
            into = ", ".join(names[link.leaf] for link in group.made)
            for i in readers:
                self.done.add(i)
                self._report(self.targets[i], "folded", into, s)

    def keep(self, left: dict[str, str]) -> dict[str, jax.Array]:
        """Scale what was not folded, and return the factors by site."""
        steps = steps_of(self.analysis, self.targets)
        together: dict[int, set[frozenset[int]]] = {}
        for step in steps:
            for i in step.targets:
                together.setdefault(i, set()).add(frozenset(step.targets))
        values: dict[str, jax.Array] = {}
        for i, target in enumerate(self.targets):
            if i in self.done:
                continue
            (members, *others) = together[i]
            rest = [j for j in sorted(members) if j not in self.done]
            shared = {site.name for j in rest for site, _ in self.targets[j].uses}
            also = {
                j
                for j, other in enumerate(self.targets)
                if {site.name for site, _ in other.uses} & shared
            }
            if others or not also <= set(rest):
                left[target.name] = "layers share its input in different ways"
                self.done |= {i}
                continue
            weights = [
                input_factors.largest_weights(self.before[t.leaf], t)
                for t in (self.targets[j] for j in rest)
            ]
            own = [self.targets[j].uses[0][0] for j in rest]
            pairs = [
                [input_factors.joined(site, values) for values in (self.seen[j], wide)]
                for j, site, wide in zip(rest, own, weights, strict=True)
            ]
            inputs, wide = (functools.reduce(jnp.maximum, m) for m in zip(*pairs))  # noqa: B905
            s = self.factors(inputs, wide)
            for j in rest:
                member = self.targets[j]
                leaf = self.leaves[member.leaf]
                self.leaves = list(self.leaves)
                self.leaves[member.leaf] = input_factors.scale(leaf, member.layout, s)
                for site, part in member.uses:
                    values[site.name] = input_factors.of_site(member, site, part, s)
                self.done.add(j)
                self._report(member, "kept", "", s)
        return values

    def _report(self, target: Target, into: str, leaves: str, s: jax.Array) -> None:
        ends = float(jnp.min(s)), float(jnp.max(s))
        row = SmoothedRow(target.name, target.path, into, leaves, *ends)
        self.rows.append(row)
