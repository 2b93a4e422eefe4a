"""Inputs that are no arrays: `train=True`, a mode, an activation function.

A function is traced for each value of them, as `jax.jit` does with static arguments.
They travel as part of the structure of a tree, not as its leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flag:
    """A value that a program is traced for.

    Attributes:
        value: hashable.
    """

    value: Any


def fix(tree: Any) -> Any:
    """Make what is no array and no number part of the structure.

    Args:
        tree: of inputs.

    Returns:
        The tree with flags in place of bools, strings, functions and the like.

    Raises:
        TypeError: such a value is not hashable.

    >>> jax.tree.leaves(fix((1.5, True, "mean")))
    [1.5]
    """
    return jax.tree.map(lambda leaf: leaf if _is_number(leaf) else _flag(leaf), tree)


def loose(tree: Any) -> Any:
    """Put the values of flags back into a tree.

    Args:
        tree: that `fix` returned.

    Returns:
        The tree as it was.

    >>> loose(fix((1.5, True)))
    (1.5, True)
    """
    return jax.tree.map(
        lambda leaf: leaf.value if _is_flag(leaf) else leaf, tree, is_leaf=_is_flag
    )


def taking(function: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """Return a function that takes inputs with flags.

    Args:
        function: that takes their values.
        inputs: that it will be called with.

    Returns:
        The function itself where there are no flags, so that traces are found again.
    """
    if not any(map(_is_flag, jax.tree.leaves(inputs, is_leaf=_is_flag))):
        return function

    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = loose((args, kwargs))
        return function(params, *args, **kwargs)

    return call


def _is_flag(node: Any) -> bool:
    return isinstance(node, Flag)


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, bool):
        return False
    return hasattr(leaf, "dtype") or isinstance(leaf, complex | float | int)


def _flag(value: Any) -> Flag:
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            "inputs must be arrays, numbers or hashable values, got one of type "
            f"{type(value).__name__}; bind it with functools.partial(apply, ...)"
        ) from error
    return Flag(value)
