"""What a caller writes beside a tree: JSON, checked before anything is written."""

import json
from typing import Any


def metadata_of(given: dict[str, Any] | None) -> dict[str, Any]:
    """Return metadata as JSON has it, or raise where it cannot hold it.

    Args:
        given: by the caller; None for none.

    Returns:
        A copy, tuples as lists.

    Raises:
        TypeError: it is no dict of JSON, or has keys that are no strings.

    >>> metadata_of({"classes": ("cat", "dog")})
    {'classes': ['cat', 'dog']}
    """
    content = {} if given is None else given
    try:
        _require_names(content)
        return dict(json.loads(json.dumps(content)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metadata must be a dict of JSON, got {given!r}; {error}"
        ) from error


def _require_names(content: Any) -> None:
    """Raise for keys that JSON would turn into strings."""
    if isinstance(content, dict):
        for key in content:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} must be a string")
        content = list(content.values())
    if isinstance(content, list | tuple):
        for value in content:
            _require_names(value)
