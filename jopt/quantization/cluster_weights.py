"""Clustering-aware training: params are centroids, latents move.

    latent' = latent + inner(g),   params = codebook[argmin_k |latent' - codebook_k|]

by `jopt.project`: gradients at the shared values move the latents (straight through),
and on every step each centroid goes to the mean of the latents that are nearest to it,
one step of k-means from where it was. Centroids lie on one grid of 2^-22 of the
largest, so that float32 params land on them exactly and a leaf has no more values than
clusters.
"""

from typing import Any, NamedTuple

import jax
import optax

from jopt.arrays import clustered, kmeans
from jopt.arrays.arguments import require_count
from jopt.arrays.axes import lay_like
from jopt.quantization.clusters import Sizes, find
from jopt.trees import paths, rules
from jopt.updates.project import (
    Projection,
    ProjectState,
    project,
    require_floats,
    require_params,
    require_transformation,
)
from jopt.updates.states import find_states, merge_masked


class ClusterState(NamedTuple):
    """Codebooks in use; `MaskedNode()` where a leaf is not clustered."""

    codebook: Any  # as params: float32 [layers ..., blocks, clusters, d]


def cluster_weights(
    inner: optax.GradientTransformation,
    num_clusters: int = 16,
    *,
    vector_size: int = 1,
    rows_per_codebook: int | None = None,
    preserve_zeros: bool = False,
    begin_step: int = 0,
    start: kmeans.Start | None = None,
    key: jax.Array | None = None,
    select: rules.Select = None,
    stacked_axes: rules.StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `inner` so that params share few values after every update.

    latent' = latent + inner(g),   params = codebook[nearest(latent')]

    Args:
        inner: any Optax transformation; `jopt.prune` with `preserve_zeros=True`.
        num_clusters: as in `jopt.cluster`, and so are the sizes below.
        vector_size: how many neighbours along the last axis share a code.
        rows_per_codebook: so many rows have a codebook of their own; None for one.
        preserve_zeros: whether latents that are exactly zero stay zeros.
        begin_step: count of the first update that clusters; centroids start there.
        start: where centroids start, as in `jopt.cluster`.
        key: a PRNG key, for starts that draw.
        select: which leaves; None for float leaves with at least two axes, stacked
            ones not counted.
        stacked_axes: which axis stacks layers, 0 or None: an int or rules.

    Returns:
        A transformation with one copy of the selected leaves in its state. To ship:
        `jopt.cluster(params, codebooks=jopt.get_centroids(state))`, with
        `preserve_zeros` as here.

    Raises:
        ValueError: sizes do not fit, a start has no key, or a rule matches nothing.

    References:
        Han et al., Deep Compression, arXiv:1510.00149; Cho et al., DKM,
        arXiv:2108.12659 (clustering while training).

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.cluster_weights(optax.sgd(0.1), 2)
    >>> params = {"w": jnp.array([[0.0, 0.5, 4.0]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.zeros((1, 3))}, state, params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[0.25, 0.25, 4.  ]], dtype=float32)
    """
    require_count("begin_step", begin_step)
    inner = require_transformation(inner, "cluster_weights")
    sizes = Sizes(num_clusters, vector_size, rows_per_codebook, preserve_zeros, start)
    sizes.check()

    def bind(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        chosen = rules.select_leaves(select, params, stacked_axes=stacked_axes)
        stacks = dict(
            zip(
                paths.leaf_paths(params),
                rules.stacked_axis_of(stacked_axes, params),
                strict=True,
            )
        )

        def begin(latent: optax.Params) -> ClusterState:
            def one(path: str, w: jax.Array) -> jax.Array:
                book = find(
                    w, sizes, importance=None, key=key, stack=stacks[path], path=path
                )
                return kmeans.on_grid(book, w.dtype)

            return ClusterState(paths.map_with_path(one, latent))

        def update(
            latent: optax.Params, state: ClusterState, count: jax.Array
        ) -> tuple[optax.Params, ClusterState]:
            if not (isinstance(begin_step, int) and begin_step == 0):
                state = jax.lax.cond(
                    count == begin_step, lambda: begin(latent), lambda: state
                )

            def move(w: jax.Array, book: jax.Array) -> jax.Array:
                book = clustered.move_codebook(w, book, keeps_zero=preserve_zeros)
                return kmeans.on_grid(book, w.dtype)

            def snap(w: jax.Array, book: jax.Array) -> jax.Array:
                q = clustered.assign_codes(w, book, keeps_zero=preserve_zeros)
                return lay_like(q.to_array(), w)

            books = jax.tree.map(move, latent, state.codebook)
            return jax.tree.map(snap, latent, books), ClusterState(books)

        treedef: Any = jax.tree.structure(params)
        return project(
            inner,
            Projection(begin, update),
            begin_step=begin_step,
            select=treedef.unflatten(chosen),
        )

    def init(params: optax.Params) -> ProjectState:
        require_floats(params, "cluster_weights")
        chosen = rules.select_leaves(select, params, stacked_axes=stacked_axes)
        rules.warn_if_none(chosen, "cluster_weights")
        return bind(params).init(params)

    def update(
        updates: optax.Updates,
        state: ProjectState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        require_params(params, "cluster_weights")
        return bind(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def get_centroids(state: optax.OptState) -> Any:
    """Read the codebooks in use out of any optimizer state.

    Args:
        state: an optimizer state with one or several `cluster_weights` at any depth.

    Returns:
        A tree like params with a codebook `[layers ..., blocks, clusters, d]` for each
        clustered leaf, `optax.MaskedNode()` for the others: what
        `jopt.cluster(params, codebooks=...)` takes.

    Raises:
        ValueError: there is no `cluster_weights` in the state.

    >>> import jax.numpy as jnp, optax, jopt
    >>> tx = jopt.cluster_weights(optax.sgd(0.1), 2)
    >>> state = tx.init({"w": jnp.array([[0.0, 0.5, 4.0]])})
    >>> get_centroids(state)["w"].ravel()
    Array([0.25, 4.  ], dtype=float32)
    """
    trees = [
        s.projection_state.codebook
        for s in find_states(state, ProjectState)
        if isinstance(s.projection_state, ClusterState)
    ]
    if not trees:
        raise ValueError(
            "state must hold codebooks, got a state without jopt.cluster_weights in "
            "it; pass the state of the transformation that was built with it"
        )
    merged = trees[0]
    for tree in trees[1:]:
        merged = merge_masked(merged, tree, both=lambda outer, inner: outer)
    return merged
