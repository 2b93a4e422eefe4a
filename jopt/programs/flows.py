"""What a value comes from: nothing, one leaf, several leaves, or the inputs too."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jopt.programs import views
from jopt.programs.views import View

Kind = Literal["weight", "gather", "derived", "activation", "constant"]
Key = tuple[int | str, ...]


class Flow(NamedTuple):
    """What a value comes from.

    Attributes:
        kind: "constant" depends on neither params nor inputs, "view" is one leaf,
            "derived" depends on params alone, "data" on the inputs.
        view: how it looks at its leaf.
        leaves: that it depends on, while it depends on nothing else.
        is_chosen: whether the inputs say which elements of the leaves it is, as an
            index does that chooses an expert.
        parts: where it is views of several leaves joined along an axis, the views.
    """

    kind: Literal["constant", "view", "derived", "data"]
    view: View | None = None
    leaves: frozenset[int] = frozenset()
    is_chosen: bool = False
    parts: tuple[View, ...] = ()

    @property
    def is_param(self) -> bool:
        """Whether it depends on params and on nothing else."""
        return self.kind in ("view", "derived")

    def unstacked(self, loop: Key) -> "Flow":
        """Say what one step of a scan sees of a stacked value."""
        if self.view is None:
            return self._replace(parts=())
        view = views.unstack(self.view, loop)
        return of_view(view, self.leaves, is_chosen=self.is_chosen)

    def stacked(self) -> "Flow":
        """Say what is put together again: derived, no view any more."""
        if self.view is None:
            return self._replace(parts=())
        return of_view(None, self.leaves, is_chosen=self.is_chosen)

    def resized(self, shape: Sequence[int]) -> "Flow":
        """Say what a device sees of a sharded value."""
        if self.view is None:
            return self._replace(parts=())
        view = views.resize(self.view, shape)
        return of_view(view, self.leaves, is_chosen=self.is_chosen)

    def placed(self, starts: tuple[int | None, ...]) -> "Flow":
        """Say what it is if its view starts elsewhere."""
        if self.view is None:
            return self
        return self._replace(view=dataclasses.replace(self.view, starts=starts))


CONSTANT, DATA = Flow("constant"), Flow("data")


def of_view(
    view: View | None, leaves: frozenset[int], *, is_chosen: bool = False
) -> Flow:
    """Make the flow of a view, or of a value derived from the leaves if it is none."""
    if view is None:
        return Flow("derived", None, leaves, is_chosen)
    return Flow("view", view, frozenset({view.leaf}), is_chosen)


def join(a: Flow, b: Flow) -> Flow:
    """Say what a value is that may be either."""
    if a == b:
        return a
    if a.view is not None and b.view is not None and a.placed(()) == b.placed(()):
        pairs = zip(a.view.starts, b.view.starts, strict=True)
        return a.placed(tuple(x if x == y else None for x, y in pairs))
    if "data" in (a.kind, b.kind):
        return DATA
    return Flow("derived", None, a.leaves | b.leaves, a.is_chosen or b.is_chosen)
