"""Which axes share a scale: what the sites of a leaf or an operand say of its axes.

Scales are constant along what is contracted, so that a product of codes can be scaled
afterwards, and their own along all else:

    x @ w       w [in, out]: one scale per output;  x [token, in]: one per token
    lookup      table [index, out]: one scale per row
    attention   kernel [in, heads, dim]: one per head and dimension

A leaf that several sites consume keeps scales only where all of them allow it: a table
that is looked up and multiplied by, [index, out] and [out, in], has one per row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jopt.arrays.specs import QuantSpec
from jopt.programs.sites import SiteTable

_KEPT = {"weight": ("out", "batch", "stacked", "index"), "gather": ("index", "stacked")}


class LeafRoles(NamedTuple):
    """What the sites of a leaf ask of its scales.

    Attributes:
        kept: the axes that keep scales of their own where nothing else is said.
        stacked: those that always do, at full length.
        is_matrix: whether it multiplies, or is a table of rows.
    """

    kept: tuple[int, ...]
    stacked: tuple[int, ...]
    is_matrix: bool


def leaf_roles(table: SiteTable) -> dict[str, LeafRoles]:
    """Join the roles of all sites of each leaf.

    Args:
        table: of a function.

    Returns:
        Path to roles, for leaves that a site consumes.

    >>> import jax.numpy as jnp
    >>> from jopt.programs.counts import sites
    >>> params = {"table": jnp.ones((5, 3)), "w": jnp.ones((3, 4))}
    >>> table = sites(lambda p, i: p["table"][i] @ p["w"], params, jnp.zeros(2, int))
    >>> {path: roles.kept for path, roles in leaf_roles(table).items()}
    {'table': (0,), 'w': (1,)}
    """
    found: dict[str, LeafRoles] = {}
    for site in table:
        for path, by_axis in site.roles_by_path.items():
            roles = _roles_at(site.kind, by_axis)
            found[path] = _both(found[path], roles) if path in found else roles
    return found


def _roles_at(kind: str, by_axis: Mapping[int, str]) -> LeafRoles:
    """Say what one site asks of a leaf's scales."""
    kept_roles = _KEPT["gather" if kind == "gather" else "weight"]
    stacked = tuple(a for a, role in by_axis.items() if role == "stacked")
    kept = tuple(a for a, role in by_axis.items() if role in kept_roles)
    if len(kept) == len(by_axis):  # a scale per element is no quantization
        kept = stacked
    return LeafRoles(
        kept, stacked, kind != "gather" or len(by_axis) - len(stacked) >= 2
    )


def _both(a: LeafRoles, b: LeafRoles) -> LeafRoles:
    """Keep scales where two sites of one leaf allow them."""
    return LeafRoles(
        tuple(sorted({*a.kept} & {*b.kept})),
        tuple(sorted({*a.stacked} & {*b.stacked})),
        a.is_matrix or b.is_matrix,
    )


def leaf_spec(spec: QuantSpec, ndim: int, roles: LeafRoles) -> QuantSpec:
    """Resolve the axes of a spec for a leaf.

    Args:
        spec: as a person wrote it.
        ndim: of the leaf.
        roles: of the leaf.

    Returns:
        The spec with explicit axes, stacked ones among them.
    """
    if spec.axis is None:
        return dataclasses.replace(spec, axis=roles.kept)
    axes = (spec.axis,) if isinstance(spec.axis, int) else spec.axis
    kept = {a % ndim if -ndim <= a < ndim else a for a in axes} | set(roles.stacked)
    return dataclasses.replace(spec, axis=tuple(sorted(kept)))


def operand_spec(spec: QuantSpec, roles: Sequence[str]) -> QuantSpec:
    """Resolve the axes of a spec for an operand of an operation.

    Args:
        spec: as a person wrote it; explicit axes are those of the operand.
        roles: of the axes of the operand.

    Returns:
        The spec with explicit axes: by default all but the contracted ones.

    >>> from jopt.arrays import formats
    >>> operand_spec(QuantSpec(formats.int8), ["batch", "out", "in"]).axis
    (0, 1)
    """
    if spec.axis is not None:
        return spec
    kept = tuple(i for i, role in enumerate(roles) if role != "in")
    return dataclasses.replace(spec, axis=kept if len(kept) < len(roles) else ())


def require_table(sites: Any, params: dict[str, Any]) -> None:
    """Raise if a table of sites does not belong to params.

    Args:
        sites: what should be a `SiteTable`.
        params: path to leaf.

    Raises:
        TypeError: it is none.
        ValueError: paths or shapes differ.
    """
    if not isinstance(sites, SiteTable):
        raise TypeError(
            f"sites must be what jopt.sites returned, got {type(sites).__name__}; call "
            "jopt.sites(apply, params, *inputs)"
        )
    for path, leaf in params.items():
        known = sites.leaves.get(path)
        shape = getattr(leaf, "shape", ())
        if known is None or known.shape != shape:
            got = "no such leaf" if known is None else f"shape {known.shape}"
            raise ValueError(
                f"sites must be of these params, got a table with {got} for {path!r} "
                f"of shape {shape}; call jopt.sites(apply, params, *inputs) again"
            )
