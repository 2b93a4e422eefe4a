"""The keywords of a rounded function: which are its own, and which are passed on.

qat(params, x, step=3)              apply(params, x)
qat(params, x, step=3)              apply(params, x, step=3), if it names `step`
qat(params, x, ranges=r, train=1)   apply(params, x, train=1)
qat(params, x, key=k)               apply(params, x), or with key=k, if it names `key`
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (bool, int, float, np.generic, np.ndarray, jax.Array)


_HINTS = {
    "ranges": "; init_ranges returns them",
    "key": "; pass key=jax.random.key(seed), another one on every step",
}
_OPTIONS = {
    "step": "begin_step=",
    "ranges": "ranges='learned'",
    "key": "gradient_rounding=",
}


class Arguments:
    """Which keywords are ours, and which are those of the function."""

    def __init__(
        self,
        apply: Callable[..., Any],
        *,
        step: str | None,
        ranges: str | None,
        key: str | None = None,
    ) -> None:
        """Look at a function.

        Args:
            apply: the function.
            step: why `step` is ours; None where it is not.
            ranges: the same of `ranges`.
            key: the same of `key`.

        Raises:
            ValueError: `ranges` is ours, and a parameter of the function.
        """
        self._reasons = {"step": step, "ranges": ranges, "key": key}
        try:
            self._signature: inspect.Signature | None = inspect.signature(apply)
        except (TypeError, ValueError):  # some callables of C tell nothing
            self._signature = None
        if ranges is not None and self._names("ranges"):
            raise ValueError(
                "ranges= of the rounded function takes the learned ranges, got an "
                "apply with an argument `ranges` of its own; give it another name"
            )

    def split(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tell the keywords of the function and ours apart.

        Args:
            inputs: all arguments by position.
            kwargs: those by name.

        Returns:
            The keywords for the function, `step` and `key` among them if it names them,
            and ours.

        Raises:
            ValueError: one of ours is missing, or one is neither ours nor its own.
        """
        kwargs, own = dict(kwargs), {}
        for name, reason in self._reasons.items():
            value = kwargs.get(name)
            if reason is not None:
                if value is None:
                    hint = _HINTS.get(name, "")
                    raise ValueError(
                        f"{name} must be given as {reason}, got none{hint}"
                    )
                own[name] = kwargs.pop(name)
                if self._names(name) and not self._is_bound(name, inputs):
                    kwargs[name] = value
            elif name in kwargs and not self._takes(name):
                if value is not None:
                    option = _OPTIONS[name]
                    raise ValueError(
                        f"{name} must be left out where neither {option} was given nor "
                        f"apply takes it, got {value!r}"
                    )
                del kwargs[name]
        return kwargs, own

    def _names(self, name: str) -> bool:
        """Tell whether the function has a parameter of the name."""
        return self._signature is not None and name in self._signature.parameters

    def _takes(self, name: str) -> bool:
        if self._signature is None or self._names(name):
            return True
        kinds = {p.kind for p in self._signature.parameters.values()}
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _is_bound(self, name: str, inputs: tuple[Any, ...]) -> bool:
        """Tell whether a parameter has its value by position."""
        assert self._signature is not None
        return name in self._signature.bind_partial(*inputs).arguments


def require_step(name: str, step: Any) -> None:
    """Raise for what is no count of steps.

    Args:
        name: of the argument.
        step: its value; None passes, and so does a traced integer.

    Raises:
        ValueError: it is none.
    """
    if step is None:
        return
    dtype = jnp.result_type(step) if isinstance(step, _NUMBERS) else None
    is_count = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if not is_count or jnp.ndim(step) or (isinstance(step, int) and step < 0):
        raise ValueError(
            f"{name} must be a count of steps, one integer of at least 0, got {step!r}"
        )
