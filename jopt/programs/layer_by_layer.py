"""The order of algorithms on columns: layer after layer, or all at once.

In order, each step asks a pass over the batches for the moments of one input, works on
what reads it, and the next pass runs with the params as they are by then. All at once,
one pass gives the moments of everything.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jopt.programs import passes
from jopt.programs.drift import drift_of_some
from jopt.programs.passes import Moments
from jopt.programs.record import track
from jopt.programs.sites import Analysis
from jopt.programs.sources import Sources
from jopt.programs.targets import Target, blame

NOT_MET = "what multiplies is not made of its numbers alone, or not in their order"


class Work(Protocol):
    """What becomes of the params.

    Attributes:
        left: path, or name of a target or layer, to why it is left alone.
    """

    left: dict[str, str]

    @property
    def params(self) -> Any:
        """As they are now."""

    def prepare(self, moments: jax.Array) -> Any:
        """Get ready what several matrices share; the moments may be used up."""

    def solve(self, i: int, layer: int, inputs: Any, seen: jax.Array) -> None:
        """Work on one layer of a target, given what `prepare` returned, and `seen`."""


class Outcome(Protocol):
    """What came of the matrices of one layer, as values of the host."""

    @property
    def is_finite(self) -> Any:
        """Whether the inputs are."""

    @property
    def is_met(self) -> Any:
        """Whether the matrices are what the inputs met."""

    @property
    def is_solved(self) -> Any:
        """Whether the result is finite."""

    @property
    def reached(self) -> Any:
        """`[batch]`, whether other inputs than zeros came."""


class Step(NamedTuple):
    """Targets that see one input, and a layer of theirs."""

    targets: list[int]
    layer: int


def run_in_order(
    work: Work,
    apply: Callable[..., Any],
    batches: Iterable[Any],
    targets: Sequence[Target],
    steps: Sequence[Step],
    kind: Moments,
    *,
    label: str,
    progress: bool,
    floats: Any = None,
) -> None:
    """Work on layer after layer, each with the inputs that those before it give.

    Args:
        work: what to do.
        apply: the function.
        batches: of inputs, that can be passed over again.
        targets: what to work on.
        steps: in the order of the program, see `steps_of`.
        kind: of moments that are needed.
        label: of the bar.
        progress: whether to show one.
        floats: params as they were, where the moments are "drift".
    """
    is_paired = kind == "drift"
    observe = (
        drift_of_some(apply, targets)
        if is_paired
        else passes.moments_of_some(apply, targets, kind)
    )
    for step in track(steps, label, progress):
        active = [i for i in step.targets if targets[i].name not in work.left]
        if not active:
            continue
        asked = [targets[i] for i in active]
        values = passes.asked(targets, asked[0], asked, step.layer)
        params = (work.params, floats) if is_paired else work.params
        found = passes.total(observe, params, batches, values)
        _, batch, columns, _ = asked[0].layout.sizes
        shape = passes.moments_shape(kind, batch, columns)
        inputs = work.prepare(found["moments"].pop(str(shape)))
        for i in active:
            seen = passes.seen_by(targets[i], found["seen"])
            work.solve(i, step.layer, inputs, seen)
        del inputs  # before the next pass


def run_all_at_once(
    work: Work,
    targets: Sequence[Target],
    steps: Sequence[Step],
    found: Mapping[str, Any],
) -> None:
    """Work on every layer with the inputs of the params as they were.

    Args:
        work: what to do.
        targets: what to work on.
        steps: in the order of the program.
        found: what a pass by `passes.moments_of_all` gave.
    """
    for i in dict.fromkeys(i for step in steps for i in step.targets):
        target = targets[i]
        moments = passes.of_target(target, found, "moments")
        seen = passes.of_target(target, found, "seen")
        for layer in range(target.layout.sizes[0]):
            if target.name not in work.left:
                work.solve(i, layer, work.prepare(moments[layer]), seen[layer])


def settle(
    target: Target,
    layer: int,
    outcome: Outcome,
    left: dict[str, str],
    *,
    params: Any,
    unreached: str,
) -> bool:
    """Raise for what cannot be worked on, and list what was left alone.

    Args:
        target: which one.
        layer: which layer of it.
        outcome: what came of it.
        left: path, or name of a target or layer, to why it is left alone; grows.
        params: that the inputs came through.
        unreached: what is said of matrices that no inputs reached.

    Returns:
        Whether the matrices are what the inputs met.

    Raises:
        ValueError: inputs are not finite, or a Gram matrix not positive definite.
    """
    name = target.layer_name(layer)
    if not outcome.is_finite:
        raise ValueError(
            "inputs of every site must be finite, got NaN or infinity at "
            f"{name!r}, or numbers whose squares are infinite in float32;"
            f" {blame(params)}, or leave {target.path!r} out with select"
        )
    if not outcome.is_met:
        left[target.name] = NOT_MET
        return False
    if not outcome.is_solved:
        raise ValueError(
            "damping must make every Gram matrix positive definite, got one that "
            f"is not at {name!r}; raise damping, or bring more rows than inputs"
        )
    list_unreached(target, layer, outcome.reached, left, unreached)
    return True


def list_unreached(
    target: Target, layer: int, reached: Any, left: dict[str, str], why: str
) -> None:
    """List a layer with matrices that no inputs reached.

    Args:
        target: which one.
        layer: which layer of it.
        reached: `[batch]`, of the host: which matrices inputs reached.
        left: name of a layer to why it is left alone; grows.
        why: what is said of it.
    """
    if not reached.all():
        count = f" in {np.sum(~reached)} of {reached.size} matrices"
        left[target.layer_name(layer)] = why + count * (reached.size > 1)


def steps_of(analysis: Analysis, targets: Sequence[Target]) -> list[Step]:
    """Sort the layers of all targets, those with one input together.

    Args:
        analysis: of the function.
        targets: what to work on.

    Returns:
        The steps, in the order of the program.
    """
    sources = Sources(analysis.traced.body)
    groups: dict[Any, list[tuple[Any, int]]] = {}
    for i, target in enumerate(targets):
        _, batch, columns, _ = target.layout.sizes
        for layer in range(target.layout.sizes[0]):
            inputs: list[Hashable] = []
            moments = []
            for site, part in target.uses:
                index = passes.layer_index(target, site, part, layer)
                loops = [a.key for a in site.around if a.kind == "layers"]
                layers = {
                    key: at
                    for key, at in zip(loops, index, strict=True)
                    if isinstance(at, int)
                }
                inputs.append((sources.input_of(site), tuple(layers.items())))
                moments.append(sources.order(site, layers))
            key: Any = (frozenset(Counter(inputs).items()), batch, columns, layer)
            groups.setdefault(key, []).append((min(moments), i))
    ordered = sorted((sorted(members), key[-1]) for key, members in groups.items())
    return [Step([i for _, i in members], layer) for members, layer in ordered]
