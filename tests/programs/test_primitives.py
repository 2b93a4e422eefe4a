"""No primitive of the running JAX goes without a decision."""

import jax.extend.core.primitives
import pytest

from jopt.programs import compat, operations, primitives, view_rules

NAMES = {
    getattr(jax.extend.core.primitives, name).name
    for name in dir(jax.extend.core.primitives)
    if name.endswith("_p")
}


def test_every_primitive_has_an_entry():
    """A new one computes, moves, holds programs or is foreign: say which."""
    assert len(NAMES) > 150
    assert sorted(NAMES - primitives.known()) == []


def test_no_primitive_has_two_entries():
    tables = [
        primitives.PLAIN,
        primitives.OPAQUE,
        view_rules.SAME,
        frozenset(view_rules.RULES) - {"gather", "dynamic_slice"},  # views, or lookups
        frozenset(operations.TABLE),
        compat.ENTERED,
    ]
    for i, table in enumerate(tables):
        for other in tables[:i]:
            assert not table & other


@pytest.mark.parametrize("name", ["scatter-add", "reduce_sum"])
def test_combiners_are_not_opaque_but_kernels_are(name):
    assert not primitives.is_opaque(name, holds_bodies=True)
    assert primitives.is_opaque("pallas_call", holds_bodies=True)
    assert primitives.is_opaque("never_heard_of", holds_bodies=True)
