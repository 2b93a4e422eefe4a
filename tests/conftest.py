"""A strict harness: eight virtual CPU devices, no silent rank promotion."""

import collections
import os
import pathlib

# Before jax is imported: the device count is read once, at the first use of a backend.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

jax.config.update("jax_numpy_rank_promotion", "raise")

# Properties take their number of examples from the profile: few in the suite, as many
# as the promises ask for in `.ci/nightly`, which draws new ones every time.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=20
)
hypothesis.settings.register_profile(
    "nightly", deadline=None, max_examples=1000, print_blob=True
)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--half",
        choices=["first", "second"],
        help="of the cases of each test with several, so that two runs share them",
    )


def values_of(item):
    """List the values of a case's parameters, joined where they are given together."""
    params = dict(item.callspec.params)
    groups = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.split(",") if isinstance(names, str) else names
        groups.append([params.pop(name.strip(), None) for name in names])
    return [repr(value) for value in [*groups, *params.values()]]


@pytest.hookimpl(trylast=True)  # markers first
def pytest_collection_modifyitems(config, items):
    """Leave out the cases that the other half has; tests with one case are in both.

    By the parity of the sum of the places of a case's parameters among their values,
    so that in a product of several each half sees every value of each.
    """
    half = config.getoption("--half")
    if half is None:
        return
    kept, others, places = [], [], {}
    sizes = collections.Counter(item.nodeid.partition("[")[0] for item in items)
    for item in items:
        test = item.nodeid.partition("[")[0]
        place = 0
        for i, value in enumerate(values_of(item) if sizes[test] > 1 else ()):
            met = places.setdefault((test, i), {})
            place += met.setdefault(value, len(met))
        is_second = place % 2 == 1
        is_mine = sizes[test] == 1 or is_second == (half == "second")
        (kept if is_mine else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let programs go: each holds some memory maps, and a process may have 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def same_numbers(request):
    """Give each test the draws that it has alone, whichever tests ran before it."""
    module = getattr(request.node, "module", None)
    for name, value in list(vars(module).items()) if module else ():
        if isinstance(value, np.random.Generator):
            states = vars(module).setdefault("__states_at_import__", {})
            state = states.setdefault(name, value.bit_generator.state)
            value.bit_generator.state = state


@pytest.fixture(scope="session")
def auto_mesh():
    """Eight devices on one automatic axis named 'data'."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="session")
def explicit_mesh():
    """Eight devices on one explicit axis named 'data'."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
