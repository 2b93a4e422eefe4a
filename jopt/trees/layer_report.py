"""A table of what was done to each layer of a model, and of what was left alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import rich.box
import rich.table
import rich.text

from jopt.trees import report


class LayerRow(Protocol):
    """One layer: a frozen dataclass."""

    @property
    def name(self) -> str:
        """Of the site, and `[layer]` where its leaf stacks layers."""

    @property
    def error(self) -> float | None:
        """Relative error of what it computes, squared; None if not measured."""

    def cells(self) -> Mapping[str, str]:
        """What the table shows, by the names of columns."""


Row = TypeVar("Row", bound=LayerRow)


@dataclasses.dataclass(frozen=True)
class LayerReport(Generic[Row]):
    """What was done to every layer, and what was left alone.

    Iterate over it for the rows, index it by the name of a row, print it for a table.

    Attributes:
        rows: of the layers, in the order of the program.
        left_alone: path, or name of a layer, to why nothing was done to it.
    """

    rows: tuple[Row, ...]
    left_alone: Mapping[str, str]

    @property
    def worst(self) -> tuple[Row, ...]:
        """The rows, the largest error first; none of them without errors."""
        measured = [(row.error, row) for row in self.rows if row.error is not None]
        return tuple(row for _, row in sorted(measured, key=lambda pair: -pair[0]))

    def shown(self) -> tuple[Row, ...]:
        """The rows in the order of the table."""
        return self.rows

    def to_dicts(self) -> list[dict[str, Any]]:
        """List the rows as dicts of JSON values.

        Returns:
            A dict per row.
        """
        return [dataclasses.asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; there are {[row.name for row in self]}")

    def __str__(self) -> str:
        """Draw the table, and list what was left alone below it."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column("layer", no_wrap=True)
        columns = self.rows[0].cells() if self.rows else {}
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.shown():
            # As Text, because a plain string may hold what rich takes for markup.
            cells = (row.name, *row.cells().values())
            table.add_row(*map(rich.text.Text, cells))
        lines = [report.draw(table)]
        if self.left_alone:
            lines.append(" left alone:")
            lines += [f"   {path}: {why}" for path, why in self.left_alone.items()]
        return "\n".join(lines)

    __repr__ = __str__


def scientific(error: float | None) -> str:
    """Write an error for a table."""
    return "" if error is None else f"{error:.2e}"
