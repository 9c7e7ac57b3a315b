"""Tables at every width: no figure is ever cut, nothing but names and codecs gives way, and what is gone is named."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from statecodec_cli.grid import Column, TextRow, TextTable

COLUMNS = (
    Column("tensor", text=True, gives="middle"),
    Column("codec", text=True, gives="fold"),
    Column("after"),
    Column("B/value", drop=2),
    Column("tensors", drop=1),
)
ROW = ("transformer.h.10.attn.c_attn.weight", "companded(curve=log,bits=8,group=64)", "12.3 MB", "0.86", "1,234")


def printed(renderable: object, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable, overflow="ignore", crop=False)
    return out.getvalue().splitlines()


def test_with_room_a_row_is_a_line() -> None:
    lines = printed(TextTable(COLUMNS, [ROW]), 1000)
    assert lines[1].split() == ["tensor", "codec", "after", "B/value", "tensors"]
    assert lines[2].split() == [ROW[0], ROW[1], "12.3", "MB", "0.86", "1,234"]
    assert lines[0] == lines[-1] == ""


def test_without_room_text_gives_way_and_then_columns_which_are_named() -> None:
    lines = printed(TextTable(COLUMNS, [ROW]), 60)
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert "12.3 MB" in text
    assert "tran" in text
    assert ".weight" in text
    assert "\N{HORIZONTAL ELLIPSIS}" in text
    assert "not shown at this width: B/value, tensors" in text
    folded = [line[cell_len(lines[1].split("codec")[0]) :].split()[0] for line in lines[2:-2]]
    assert "".join(folded) == ROW[1]


WORD = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=60)


@given(
    rows=st.lists(st.tuples(WORD, WORD, st.from_regex(r"\d{1,3} MB", fullmatch=True)), min_size=1, max_size=5),
    width=st.integers(50, 200),
)
def test_every_width_fits_and_keeps_every_figure(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = (Column("name", text=True, gives="middle"), Column("codec", text=True, gives="fold"), Column("size"))
    lines = printed(TextTable(columns, rows), width)
    assert max(map(cell_len, lines)) <= width
    shown = "\n".join(lines)
    for _, codec, size in rows:
        assert size in shown
        assert set(codec) <= set(shown)


def test_wide_characters_are_folded_by_the_cells_they_take() -> None:
    columns = (Column("name", text=True, gives="middle"), Column("codec", text=True, gives="fold"), Column("size"))
    lines = printed(TextTable(columns, [("0" * 19, "0" * 18 + "\N{CJK RADICAL REPEAT}" * 3, "0 MB")]), 50)
    assert max(map(cell_len, lines)) <= 50
    assert "".join(lines).count("\N{CJK RADICAL REPEAT}") == 3


def test_the_list_of_what_is_not_shown_fits_as_well() -> None:
    columns = [Column("name"), *(Column(f"a column {i}", drop=1) for i in range(20))]
    lines = printed(TextTable(columns, [["x"] * 21]), 60)
    assert max(map(len, lines)) <= 60
    assert sum(line.count("a column") for line in lines) == 20


def test_a_name_of_a_million_characters_is_printed_in_no_time() -> None:
    lines = printed(TextTable(COLUMNS, [("x" * 1_000_000, "raw", "1 B", "1", "1")]), 80)
    assert max(map(len, lines)) <= 80


def test_facts_break_between_facts_only() -> None:
    facts = TextRow("ckpt.pt  6.31 MB", Text("->  " + "a" * 70), "", "2.85x")
    assert printed(facts, 60) == ["ckpt.pt  6.31 MB", "  ->  " + "a" * 70, "  2.85x"]
    assert printed(facts, 200) == ["ckpt.pt  6.31 MB   ->  " + "a" * 70 + "   2.85x"]
