"""How sparse one-shot pruning makes each leaf: fractions and patterns, from rules."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jopt.arrays.patterns import NM, Pattern, Unstructured
from jopt.programs.targets import Target
from jopt.trees import paths, rules

_UNSTRUCTURED = Unstructured()


class Goal(NamedTuple):
    """How sparse a leaf is to be; without a sparsity, as its pattern says."""

    sparsity: float | None
    pattern: Pattern


def resolve_goals(sparsity: Any, pattern: Any, params: Any) -> list[Goal | None]:
    """Say how sparse each leaf is to be.

    Args:
        sparsity: a fraction, None for N:M, or rules `{path pattern: fraction or None}`.
        pattern: one, or rules `{path pattern: pattern or None}`; leaves that no rule
            matches are unstructured.
        params: the parameters.

    Returns:
        A goal per leaf, None for those that a rule leaves alone.

    Raises:
        TypeError: a pattern is none of `Unstructured()` and `NM(n, m)`, or a sparsity
            is no number.
        ValueError: a sparsity is missing, out of [0, 1], or given beside N:M.
    """
    names = paths.leaf_paths(params)
    wanted = _per_leaf(sparsity, params, None)
    patterns = _per_leaf(pattern, params, _UNSTRUCTURED)
    for found in (*_values(pattern), *patterns):
        if found is not None:
            _check_pattern(found)
    for found in _values(sparsity):
        if found is not None:
            _check_sparsity(found)
    for found in () if _is_rules(pattern) else (pattern,):
        _check_pair(sparsity, found)
    goals: list[Goal | None] = []
    for path, own, form in zip(names, wanted, patterns, strict=True):
        if form is None or (own is None and not isinstance(form, NM)):
            goals.append(None)
        elif isinstance(form, NM):
            if own is not None and _is_rules(sparsity):
                raise ValueError(
                    f"sparsity must be None where the pattern is {form}, got {own} at "
                    f"{path!r}; give one of the two rules None there"
                )
            goals.append(Goal(None, form))
        else:
            goals.append(Goal(float(own), form))
    return goals


def _check_pair(sparsity: Any, pattern: Any) -> None:
    """Raise if one pattern for all and the sparsity do not go together."""
    if isinstance(pattern, NM) and sparsity is not None:
        raise ValueError(
            f"sparsity must be None for {pattern}, got {sparsity!r}; the pattern fixes "
            f"it at {pattern.m - pattern.n} of {pattern.m}"
        )
    if not isinstance(pattern, NM) and sparsity is None:
        raise ValueError(
            f"sparsity must be given for {pattern}, got None; 50 % of zeros is 0.5"
        )


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Unstructured | NM):
        raise TypeError(
            "pattern must be jopt.Unstructured(), jopt.NM(n, m) or rules of them, got "
            f"{pattern!r}"
        )
    if isinstance(pattern, NM) and pattern.axis != -2:
        raise ValueError(
            f"pattern {pattern} must leave its axis out, got axis={pattern.axis}: N:M "
            "runs along the inputs of each site"
        )


def _check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(
            "sparsity must be a number or rules {path pattern: number}, got "
            f"{sparsity!r}"
        )
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(
            f"sparsity must be a fraction in [0, 1], got {sparsity}; 50 % of zeros is "
            "0.5"
        )


def _is_rules(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return [own for _, own in value] if _is_rules(value) else [value]


def _per_leaf(value: Any, params: Any, default: Any) -> list[Any]:
    if _is_rules(value):
        return rules.resolve(value, params, default=default)
    return [value] * len(paths.leaf_paths(params))


def check_groups(target: Target) -> None:
    """Raise if the inputs of a leaf do not divide into the groups of its pattern."""
    pattern, columns = target.goal.pattern, target.layout.sizes[2]
    if isinstance(pattern, NM) and columns % pattern.m:
        raise ValueError(
            f"pattern {pattern} must divide the inputs of every leaf into groups of "
            f"{pattern.m}, got {columns} inputs at {target.path!r}; leave it out with "
            "select, or give it another pattern by a rule"
        )
