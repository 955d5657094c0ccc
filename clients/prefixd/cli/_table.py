"""Tables: a line a row and columns apart by spaces, as people read them and scripts cut them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from prefixd.cli._shared import stdout

__all__ = ["Column", "print_pairs", "print_table"]

_GAP = "  "


@dataclass(frozen=True)
class Column:
    head: str
    right: bool = False
    """for numbers"""
    gives_way: bool = False
    """It ends with … where the terminal is too narrow for the row. Every other column is whole,
    and so is this one through a pipe."""


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """A cell for each column in each row; no cell holds a line break."""
    lines = [[column.head for column in columns], *rows]
    widths = _widths(columns, lines)
    for number, line in enumerate(lines):
        fitted = map(_fit, line, columns, widths)
        # Blanks at the end would wrap on a terminal that the words just fit.
        text = Text(_GAP.join(fitted).rstrip(), style="" if number else "bold")
        stdout.print(text, soft_wrap=True)


def print_pairs(*pairs: tuple[str, str]) -> None:
    """A name and its value a line."""
    width = max(cell_len(name) for name, _ in pairs)
    for name, value in pairs:
        label = set_cell_size(name, width) + _GAP
        text = Text.assemble((label, "bold"), value) if value else Text(name, style="bold")
        stdout.print(text, soft_wrap=True)


def _widths(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> list[int]:
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    if stdout.is_terminal:
        row = sum(widths) + len(_GAP) * (len(widths) - 1)
        excess = max(row - stdout.width, 0)
        for index, column in enumerate(columns):
            if column.gives_way:
                widths[index] = max(widths[index] - excess, cell_len(column.head))
    return widths


def _fit(cell: str, column: Column, width: int) -> str:
    if cell_len(cell) > width:
        cell = set_cell_size(cell, width - 1) + "…"
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if column.right else cell + blanks
