"""What is wrong with an argument whatever the params: one sentence for each.

Numbers that are traced pass: they may be right, and are only known later.
"""

import inspect
from collections.abc import Callable
from typing import Any

from jopt.arrays import patterns
from jopt.arrays.arguments import check_key, require_count
from jopt.pruning.allocation.units import uniform
from jopt.pruning.scores.score import Score, takes_two


def check_steps(every_steps: Any, begin_step: Any, end_step: Any) -> None:
    """Raise for a schedule of mask updates that is none; traced numbers pass."""
    require_count("every_steps", every_steps, least=1)
    require_count("begin_step", begin_step)
    is_known = isinstance(begin_step, int)
    if end_step is not None:
        require_count("end_step", end_step, least=begin_step if is_known else 0)


def check_allocation(allocation: Any) -> None:
    """Raise for what is no allocation, or one with options that was not called."""
    if not callable(allocation):
        raise TypeError(
            "allocation must be a function (units, sparsity) -> kept, got "
            f"{allocation!r}; jopt.allocation has uniform and global_ranking"
        )
    if not takes_two(allocation) or _has_only_options(allocation):
        name = getattr(allocation, "__name__", repr(allocation))
        raise TypeError(
            f"allocation must take (units, sparsity), got {name}, which does not; an "
            f"allocation with options is called first: jopt.allocation.{name}(...)"
        )


def _has_only_options(fn: Callable[..., Any]) -> bool:
    """Tell whether all arguments of a function have defaults, as those of `owl` do."""
    try:
        given = inspect.signature(fn).parameters.values()
    except ValueError:  # written in C, without a signature
        return False
    return all(each.default is not each.empty for each in given)


def check_uniform(allocation: Any, pattern: Any) -> None:
    """Raise for an allocation where the pattern fixes the count of every group."""
    if isinstance(pattern, patterns.NM) and allocation is not uniform:
        raise ValueError(
            f"allocation must be uniform for {pattern}, which keeps "
            f"{pattern.n} of every {pattern.m} everywhere, got {allocation!r}"
        )


def check_key_of(score: Score, key: Any) -> None:
    """Raise as `check_key`, and for no key where scores are random."""
    check_key(key)
    if score.random and key is None:
        raise ValueError(
            "key must be given for random scores, got None; "
            "for example key=jax.random.key(0)"
        )
