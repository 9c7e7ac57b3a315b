"""Tables and lines of facts that fit the terminal, from 60 columns up.

Where a table is too wide, text columns are shortened first (codecs are folded, names lose their middle), then the least
important columns are left out and named below the table. Figures are never cut. In a pipe nothing is shortened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_GAP = 2
_MANY = 400  # rows; more are cut with a remark
_FLOOR = {"fold": 18, "middle": 30}  # a text column gets no narrower than this as long as others can go
_LAST = {"fold": 14, "middle": 18}  # ... and than this when none can


@dataclass(frozen=True)
class Column:
    """A column: its heading, how its text is shortened, and when it is left out (highest first, 0 never)."""

    name: str
    text: bool = False
    gives: Literal["", "fold", "middle"] = ""
    drop: int = 0


class TextTable:
    """A table, printed by rich. Cells are text; control characters in them are the caller's to escape."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        self._columns = list(columns)
        self._rows = [list(row) for row in rows[:_MANY]]
        self._left_out = len(rows) - len(self._rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, widths = self._fit(options.max_width)
        yield Text()
        yield self._line([self._columns[i].name for i in shown], shown, widths, "bold")
        for row in self._rows:
            pieces = [_pieces(row[i], widths[i], self._columns[i]) for i in shown]
            for height in range(max(map(len, pieces))):
                yield self._line([p[height] if height < len(p) else "" for p in pieces], shown, widths)
        if self._left_out:
            yield Text(f"{self._left_out:,} more; --json lists all", style="dim")
        hidden = [c.name for i, c in enumerate(self._columns) if i not in shown]
        if hidden:
            words = ["not shown at this width:", *(f"{name}," for name in hidden[:-1]), hidden[-1]]
            yield TextRow(*(Text(word, style="dim") for word in words), gap=1)
        yield Text()

    def _fit(self, width: int) -> tuple[list[int], list[int]]:
        """The columns that are shown, and every column's width."""
        natural = [
            max(cell_len(text) for text in (column.name, *(row[i] for row in self._rows)))
            for i, column in enumerate(self._columns)
        ]
        shown = list(range(len(self._columns)))
        while True:
            last = max(shown, key=lambda i: self._columns[i].drop)
            droppable = self._columns[last].drop > 0
            widths = self._narrowed(natural, shown, width, _FLOOR if droppable else _LAST)
            if not droppable or sum(widths[i] for i in shown) + _GAP * (len(shown) - 1) <= width:
                return shown, widths
            shown.remove(last)

    def _narrowed(
        self, natural: Sequence[int], shown: Sequence[int], width: int, floors: Mapping[str, int]
    ) -> list[int]:
        """Every column's width after text columns were shortened, the widest first, but not below their floors."""
        space = width - _GAP * (len(shown) - 1)
        giving = [i for i in shown if self._columns[i].gives]
        widths = [min(n, space) if i in giving else n for i, n in enumerate(natural)]
        while sum(widths[i] for i in shown) > space:
            wide = [i for i in giving if widths[i] > floors[self._columns[i].gives]]
            if not wide:
                break
            widths[max(wide, key=lambda i: widths[i])] -= 1
        return widths

    def _line(self, cells: Sequence[str], shown: Sequence[int], widths: Sequence[int], style: str = "") -> Text:
        line = ""
        for cell, i in zip(cells, shown, strict=True):
            space = " " * (widths[i] - cell_len(cell))
            line += (cell + space if self._columns[i].text else space + cell) + " " * _GAP
        return Text(line.rstrip(), style=style, no_wrap=True, overflow="ignore")


class TextRow:
    """Short pieces of text in a row, which breaks only between them; what is longer than the terminal stays whole."""

    def __init__(self, *facts: Text | str, gap: int = 3) -> None:
        self._facts = [fact if isinstance(fact, Text) else Text(fact) for fact in facts if len(fact)]
        self._gap = gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(no_wrap=True, overflow="ignore")
        for fact in self._facts:
            if line and cell_len(line.plain) + self._gap + cell_len(fact.plain) > options.max_width:
                yield line
                line = Text("  ", no_wrap=True, overflow="ignore")
            elif line:
                line.append(" " * self._gap)
            line.append_text(fact)
        yield line


def _pieces(text: str, width: int, column: Column) -> list[str]:
    """The lines of one cell."""
    if cell_len(text) <= width or not column.gives:
        return [text]
    return list(_folded(text, width)) if column.gives == "fold" else [_shortened(text, width)]


def _folded(text: str, width: int) -> Iterator[str]:
    """Broken after commas and brackets where that is possible."""
    line = ""
    for piece in re.findall(r"\(?[^,(\s]*[,(\s]?", text):
        if line and cell_len(line + piece.rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece
        if cell_len(line.rstrip()) > width:
            *full, line = chop_cells(line, width)
            yield from full
    if line.strip():
        yield line.rstrip()


def _shortened(text: str, width: int) -> str:
    """Without its middle; more of the end is kept, where names differ."""
    kept = width - 1
    while True:
        head, tail = kept // 3, kept - kept // 3
        short = f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - tail :]}"
        if cell_len(short) <= width or not kept:
            return short
        kept -= 1
