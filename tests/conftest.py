"""A strict harness: eight virtual CPU devices, no silent rank promotion."""

import os
import pathlib

# Before jax is imported: the device count is read once, at the first use of a backend.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
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


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let programs go: each holds some memory maps, and a process may have 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def auto_mesh():
    """Eight devices on one automatic axis named 'data'."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="session")
def explicit_mesh():
    """Eight devices on one explicit axis named 'data'."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
