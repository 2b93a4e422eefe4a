"""What a handler is, and what it sees of a site."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jopt.arrays.compressed import CompressedArray
from jopt.programs.operations import Site


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """What a handler sees of a site.

    Attributes:
        site: which one.
        operands: those of the operation, arrays or compressed arrays.
        default: computes the operation on given operands, arrays or compressed ones,
            which it decompresses.
        rest: its further operands: the group sizes of a `ragged_dot`.
        value: what was passed along for the site, of this layer: its range.
    """

    site: Site
    operands: tuple[Any, ...]
    default: Callable[..., jax.Array]
    rest: tuple[Any, ...] = ()
    value: Any = None

    @property
    def weight(self) -> Any:
        """The operand that comes from a parameter; of activations, the second one."""
        return self.operands[self.site.operand]

    @property
    def x(self) -> Any:
        """The other operand; of a lookup, the indices."""
        return self.operands[1 - self.site.operand]

    def run(self, *, x: Any = None, weight: Any = None) -> jax.Array:
        """Compute the operation with other operands in place of its own.

        Args:
            x: in place of `self.x`.
            weight: in place of `self.weight`.

        Returns:
            The result.
        """
        operands = list(self.operands)
        if x is not None:
            operands[1 - self.site.operand] = x
        if weight is not None:
            operands[self.site.operand] = weight
        return self.default(*operands)


def _is_covered_weight(site: Site) -> bool:
    return site.is_weight


@dataclasses.dataclass(frozen=True)
class Handler:
    """What to do at which sites.

    It may be called more than once per trace, so it must be pure.

    Attributes:
        call: the result of a site, and beside it the aux value if `initial` is given.
        select: which sites to call it at; by default those that consume one leaf.
        initial: the aux value of a site that has not run: it says the structure, shapes
            and dtypes too. None for a handler without aux.
        merge: the aux value of two runs, of which the initial value is the neutral
            element; needed for sites inside `while` loops. Without it, scans over what
            are no layers stack their aux values instead of merging them.
        stacks_layers: whether scans over layers stack the aux values of their layers;
            if not, they are merged as those of other loops are.
    """

    call: Callable[[Use], Any]
    select: Callable[[Site], bool] = _is_covered_weight
    initial: Callable[[Site], Any] | None = None
    merge: Callable[[Any, Any], Any] | None = None
    stacks_layers: bool = True


IDENTITY = Handler(lambda use: use.default(*use.operands))


def to_array(value: Any) -> Any:
    """Decompress what is compressed.

    Args:
        value: an array or a compressed one.

    Returns:
        The array.
    """
    return value.to_array() if isinstance(value, CompressedArray) else value


def is_compressed(node: Any) -> bool:
    """Tell whether a value stands for an array in fewer bytes."""
    return isinstance(node, CompressedArray)
