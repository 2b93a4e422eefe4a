"""Ordered rules, pattern to value: how one says 'this, for those leaves'.

A pattern is a regular expression that must match a whole path ('.*/kernel'); the first
pattern that matches a leaf decides. A pattern that matches no leaf is a typing error
until proven otherwise, and raises with the names that come near.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trees import paths

Value = TypeVar("Value")
Rules = Mapping[str, Value] | Sequence[tuple[str, Value]]
Predicate = Callable[[str, Any], bool]
Select = Any  # a Predicate, a tree of bools that is a prefix of params, or None
StackedAxes = int | Rules[int | None] | None


def resolve(
    rules: Rules[Value | None], tree: Any, *, default: Value | None = None
) -> list[Value | None]:
    """Find the value of every leaf: the one of the first pattern that matches its path.

    Args:
        rules: a mapping or a sequence of (pattern, value), in order of precedence.
        tree: the leaves to name.
        default: the value of leaves that no pattern matches.

    Returns:
        One value per leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: a pattern matches no leaf of a tree that has leaves, or is no
            regular expression.

    >>> params = {"dense": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0}}
    >>> resolve({"head/.*": 8, ".*/kernel": 4}, params)
    [None, 4, 8]
    """
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    compiled = [(compile_pattern(pattern), value) for pattern, value in pairs]
    names = paths.leaf_paths(tree)
    check_patterns((pattern for pattern, _ in compiled), names)
    return [
        next((value for p, value in compiled if p.fullmatch(name)), default)
        for name in names
    ]


def is_rules(value: Any) -> bool:
    """Tell ordered rules from a single value."""
    return isinstance(value, Mapping | list | tuple)


def values(value: Any, name: str) -> list[Any]:
    """List what rules may give, or the one value that is for all leaves.

    Args:
        value: rules, or anything else.
        name: of the argument, for the error.

    Returns:
        The values.

    Raises:
        TypeError: a rule of a sequence is no pair.

    >>> values({"head/.*": 8, ".*": 4}, "bits"), values(8, "bits")
    ([8, 4], [8])
    """
    if isinstance(value, Mapping):
        return list(value.values())
    if not is_rules(value):
        return [value]
    for rule in value:
        if not (isinstance(rule, list | tuple) and len(rule) == 2):
            raise TypeError(
                f"{name} must be one value or ordered rules {{pattern: value}}, got "
                f"{rule!r} among them; rules in a sequence are pairs (pattern, value)"
            )
    return [each for _, each in value]


def check_patterns(
    patterns: Iterable[str | re.Pattern[str]], names: Sequence[str]
) -> None:
    """Raise for a pattern that matches none of the names, unless there are no names.

    Args:
        patterns: regular expressions.
        names: the paths of all leaves.

    Raises:
        ValueError: a pattern matches none; the message lists near names.

    >>> check_patterns([".*kernal"], ["dense/kernel"])
    Traceback (most recent call last):
        ...
    ValueError: rules must match at least one leaf each: got '.*kernal', which matches \
none of 1; near names: 'dense/kernel'
    """
    for pattern in map(compile_pattern, patterns):
        if names and not any(pattern.fullmatch(name) for name in names):
            raise ValueError(
                f"rules must match at least one leaf each: got {pattern.pattern!r}, "
                f"which matches none of {len(names)}; {_way_out(pattern, names)}"
            )


@dataclasses.dataclass(frozen=True)
class Matching:
    """The predicate that `matching` returns: true where any pattern matches."""

    patterns: tuple[str, ...]

    def __call__(self, path: str, leaf: Any) -> bool:
        """Tell whether the whole path matches one of the patterns."""
        return any(re.fullmatch(pattern, path) for pattern in self.patterns)


def matching(*patterns: str) -> Matching:
    """Select the leaves whose path matches any of the patterns.

    Args:
        *patterns: regular expressions for whole paths, at least one.

    Returns:
        A predicate for `select=`, whose patterns must each match a leaf there.

    Raises:
        ValueError: there is no pattern, or one is no regular expression.

    >>> matching(".*/kernel", "embed/.*")("block_0/attn/kernel", None)
    True
    """
    if not patterns:
        raise ValueError(
            "matching must have at least one pattern, got none; '.*' matches every path"
        )
    return Matching(tuple(compile_pattern(pattern).pattern for pattern in patterns))


def warn_if_none(chosen: Sequence[bool], name: str) -> None:
    """Warn that a transformation has nothing to do on a tree with leaves."""
    if chosen and not any(chosen):
        warnings.warn(
            f"{name} selects none of {len(chosen)} leaves: by default those are float "
            "leaves with two axes or more; choose others with select=",
            stacklevel=4,
        )


def select_leaves(
    select: Select, tree: Any, *, stacked_axes: StackedAxes = None
) -> list[bool]:
    """Decide which leaves a technique works on.

    Args:
        select: None for float leaves with at least two axes, stacked ones not counted;
            a predicate `(path, leaf) -> bool`, `matching(...)` among them; or a tree of
            bools shaped as `tree` or as a prefix of it.
        tree: params.
        stacked_axes: which axis of which leaf stacks layers, see `stacked_axis_of`.

    Returns:
        One bool per leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: a selected leaf is no float array, a pattern matches no leaf, or the
            tree of bools does not fit.
        TypeError: `select` holds something else than bools.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> select_leaves(None, params)
    [False, True]
    >>> select_leaves(lambda path, leaf: True, params)
    [True, True]
    """
    leaves = paths.leaves_with_path(tree)
    if not leaves:  # as `optax.tree.map_params` calls `init`
        return []
    if select is None:
        stacks = stacked_axis_of(stacked_axes, tree)
        return [
            _is_float(leaf) and leaf.ndim - (axis is not None) >= 2
            for (_, leaf), axis in zip(leaves, stacks, strict=True)
        ]
    if isinstance(select, Matching):
        check_patterns(select.patterns, [path for path, _ in leaves])
    # An Equinox module is callable too; as a tree it is not its own only leaf.
    if callable(select) and jax.tree_util.all_leaves([select]):
        chosen = [bool(select(path, leaf)) for path, leaf in leaves]
    else:
        chosen = _broadcast_bools(select, tree)
    for (path, leaf), is_chosen in zip(leaves, chosen, strict=True):
        if is_chosen and not _is_float(leaf):
            raise ValueError(
                f"select must choose float arrays, got {_describe(leaf)} at {path!r}; "
                "leave it out"
            )
    return chosen


def check_stacked_axes(stacked_axes: StackedAxes) -> None:
    """Raise for what names no axes, whatever the params."""
    for axis in values(stacked_axes, "stacked_axes"):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(
                "stacked_axes must be an integer or rules {pattern: integer}, got "
                f"{axis!r}; 0 is the first axis, None is for leaves that stack nothing"
            )


def stacked_axis_of(stacked_axes: StackedAxes, tree: Any) -> list[int | None]:
    """Find the axis along which each leaf stacks the layers of a scan.

    Args:
        stacked_axes: None for no stacked leaves, one axis for all leaves that have it,
            or rules `{pattern: axis or None}`.
        tree: params.

    Returns:
        Per leaf its stacked axis, counted from 0, or None.

    Raises:
        TypeError: an axis is no integer.
        ValueError: a rule names an axis that its leaf lacks, or matches nothing; no
            leaf has the one axis.

    >>> params = {"layers": jnp.ones((12, 8, 8)), "head": jnp.ones((8, 2))}
    >>> stacked_axis_of({"layers": 0}, params)
    [None, 0]
    """
    check_stacked_axes(stacked_axes)
    leaves = paths.leaves_with_path(tree)
    if stacked_axes is None:
        return [None] * len(leaves)
    if isinstance(stacked_axes, int):
        ranks = [np.ndim(leaf) if _is_array(leaf) else 0 for _, leaf in leaves]
        if ranks and not any(-rank <= stacked_axes < rank for rank in ranks):
            raise ValueError(
                f"stacked_axes must be an axis of some leaf, got {stacked_axes} for "
                f"leaves of at most {max(ranks)} axes"
            )
        return [
            stacked_axes % rank if -rank <= stacked_axes < rank else None
            for rank in ranks
        ]
    found = resolve(stacked_axes, tree)
    return [
        None if axis is None else _checked_axis(axis, path, leaf)
        for (path, leaf), axis in zip(leaves, found, strict=True)
    ]


def _checked_axis(axis: int, path: str, leaf: Any) -> int:
    rank = leaf.ndim if _is_array(leaf) else 0
    if not -rank <= axis < rank:
        raise ValueError(
            f"stacked_axes must name an axis of {path!r}, got axis {axis} for "
            f"{_describe(leaf)}"
        )
    return axis % rank


def compile_pattern(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """Compile a pattern of a rule, or raise a `ValueError`."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"rules must be regular expressions, got {pattern!r} ({error}); "
            "re.escape quotes a path"
        ) from error


def _way_out(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    within = [name for name in names if pattern.search(name)][:3]
    literal = re.sub(r"\\.|[.*+?^$()\[\]{}|]", "", pattern.pattern)
    listed = name_near(literal, names, within)
    if not within:
        return listed
    return f"{listed}; a pattern matches whole paths, so try '.*{pattern.pattern}.*'"


def name_near(name: str, names: Sequence[str], within: Sequence[str] = ()) -> str:
    """List up to three names that come near a name, for an error."""
    near = within or difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    return "near names: " + ", ".join(map(repr, near or names[:3]))


def _broadcast_bools(select: Any, tree: Any) -> list[bool]:
    """Repeat every bool of a prefix tree for all the leaves below it."""
    chosen: list[bool] = []

    def repeat(flag: Any, subtree: Any) -> None:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                "select must be None, a predicate (path, leaf) -> bool or a tree of "
                f"bools, got {type(flag).__name__} in it"
            )
        chosen.extend([bool(flag)] * len(paths.leaf_paths(subtree)))

    try:
        jax.tree.map(repeat, select, tree)
    except ValueError as error:
        raise ValueError(
            "select must be a tree of bools shaped as params or as a prefix, got "
            f"{jax.tree.structure(select)} for {jax.tree.structure(tree)}; "
            "jopt.matching(...) chooses by path"
        ) from error
    return chosen


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_float(leaf: Any) -> bool:
    if not _is_array(leaf) or paths.is_whole_leaf(leaf):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _describe(leaf: Any) -> str:
    if _is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__
