"""What is wrong with an argument whatever the arrays: one sentence for each.

Numbers that are traced pass: they may be right, and are only known later.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_flags(**given: Any) -> None:
    """Raise for what is neither True nor False: a string is true whatever it says."""
    for name, value in given.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_function(name: str, value: Any, form: str, example: str) -> None:
    """Raise for what cannot be called.

    Args:
        name: of the argument.
        value: its value.
        form: what it takes and returns, such as "(params, *inputs) -> outputs".
        example: the way out.
    """
    if not callable(value):
        got = repr(value)
        got = got if len(got) <= 80 else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be a function {form}, got {got}; {example}")


def require_count(name: str, value: Any, *, least: int = 0) -> None:
    """Raise if a number of steps is no integer or too small; traced ones pass."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_integer = jnp.issubdtype(value.dtype if is_array else type(value), jnp.integer)
    is_known = is_integer and not isinstance(value, jax.core.Tracer)
    # NumPy compares at once what JAX would make a part of a program around.
    if not is_integer or np.ndim(value) or (is_known and np.asarray(value) < least):
        raise ValueError(
            f"{name} must be an integer of at least {least}, got {value!r}"
        )


def check_number(name: str, value: Any, example: str) -> None:
    """Raise for what is no number."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    dtype = value.dtype if is_array else type(value)
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not is_number or np.ndim(value):
        raise TypeError(f"{name} must be a number, got {value!r}; {example}")


def check_share(name: str, value: Any, example: str) -> None:
    """Raise for a number that is not in [0, 1], or no number."""
    check_number(name, value, example)
    if not isinstance(value, jax.core.Tracer) and not 0 <= np.asarray(value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}; {example}")


def check_strength(name: str, value: Any, example: str) -> None:
    """Raise for a weight of a penalty that is negative, or no number."""
    check_number(name, value, example)
    if isinstance(value, jax.core.Tracer):
        return
    if not (math.isfinite(value) and np.asarray(value) >= 0):
        raise ValueError(
            f"{name} must be at least 0 and finite, got {value}; {example}"
        )


def check_path(path: Any) -> None:
    """Raise for what names no file or directory."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be a str or a pathlib.Path, got {path!r}; for example "
            "'runs/1' or 'model.safetensors'"
        )


def check_key(key: Any, *, is_optional: bool = True) -> None:
    """Raise for what is no single PRNG key; None passes where there need be none."""
    dtype, shape = getattr(key, "dtype", None), np.shape(key)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype == jnp.uint32 and len(shape) == 1
    if (key is None and is_optional) or (is_typed and shape == ()) or is_raw:
        return
    got = repr(key) if dtype is None else f"an array {dtype}{list(shape)}"
    raise TypeError(
        f"key must be one PRNG key, got {got}; for example key=jax.random.key(0)"
    )
