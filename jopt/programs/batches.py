"""Batches that a driver passes over again and again, and the function they are for.

Algorithms that prune or quantize with calibration data run outside of any program: each
pass is one, and what it finds decides about the next.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.arrays.arguments import check_function
from jopt.programs import flags, sites
from jopt.programs.record import inputs_of, require_batches
from jopt.programs.sites import Analysis
from jopt.programs.targets import Target


def check_apply(apply: Any) -> None:
    """Raise for what is no function of params."""
    check_function(
        "apply",
        apply,
        "(params, *inputs) -> outputs",
        "jopt.functional makes one of a module",
    )


class Passes:
    """Batches, of which each pass must find some."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._number = 0

    def __iter__(self) -> Iterator[Any]:
        self._number += 1
        found = iter(self._batches)
        for first in found:
            yield first
            yield from found
            return
        if self._number == 1:
            raise ValueError("batches must have at least one item, got none")
        raise ValueError(
            "batches must give the same items every time they are passed over, got "
            f"none in pass {self._number}; pass a list, or a loader that starts anew"
        )

    def __length_hint__(self) -> int:
        return operator.length_hint(self._batches)


def begin(
    name: str, apply: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> tuple[Passes, Analysis]:
    """Look at a function with the first of its batches.

    Args:
        name: of the driver, for errors.
        apply: the function.
        params: its parameters.
        batches: of inputs, as `record` takes them; an iterator is read into a list.

    Returns:
        The batches, to pass over, and the analysis.

    Raises:
        TypeError: `apply` is no function, `batches` are none, or anything is traced.
        ValueError: there is no batch.
    """
    check_apply(apply)
    require_batches(batches)
    passes = Passes(batches)
    first = next(iter(passes))
    values = [*jax.tree.leaves((params, first)), jnp.zeros([])]
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise TypeError(
            f"{name} must be called outside of jax.jit and other transformations, "
            "because it runs passes over the batches one after another, got traced "
            "params or inputs; compile what uses the result"
        )
    return passes, sites.analyse(apply, params, flags.fix(inputs_of(first)), {})


def require_targets(
    name: str, verb: str, targets: Sequence[Target], left: Mapping[str, str]
) -> None:
    """Raise if there is nothing to work on.

    Args:
        name: of the driver.
        verb: what it does.
        targets: what was found.
        left: path to the reason of what was not.

    Raises:
        ValueError: nothing was.
    """
    if not targets:
        listed = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(
            f"{name} must have something to {verb}, got no leaf that it can "
            f"({listed or 'none is selected'}); choose others with select"
        )
