"""Conditions on metadata: what they find, and that nothing in them is run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from llmvis.index.where import WhereError, mask, parse_where

TABLE = pa.table(
    {
        "id": ["a", "b", "c", "d"],
        "width": [100, 512, 1024, None],
        "caption": ["a red rose", "roses", None, "tulip."],
        "ok": [True, False, None, True],
        "share": [0.5, -1.0, 2.5, 0.0],
    }
)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("width >= 512", "bc"), ("width != 512", "ac"), ("100 < width <= 1024", "bc"), ("512 <= width", "bc"),
        ("not width >= 512", "a"), ("width is None", "d"), ("width is not None", "abc"),
        ("'rose' in caption", "ab"), ("'rose' not in caption", "d"), ("caption.startswith('a ')", "a"),
        ("caption.endswith('.')", "d"), ("caption == 'roses' or id == \"d\"", "bd"),
        ("id in ('a', 'c', 'x')", "ac"), ("width not in (100, 512)", "c"), ("ok", "ad"), ("not ok", "b"),
        ("share == -1", "b"), ("ok == True and (share > 0 or width is None)", "ad"), ("1 == 1", "abcd"),
        (" width  <  0 ", ""), ("caption == \"'; drop table\"", ""), ("caption == '%'", ""), ("'.*' in caption", ""),
    ],
)  # fmt: skip
def test_a_condition_finds_its_rows_and_a_null_never(text: str, ids: str) -> None:
    found = mask(TABLE, parse_where(text, TABLE.column_names))
    assert "".join(TABLE["id"].filter(pa.array(found)).to_pylist()) == ids


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "width", "width +", "width > ", "wdth > 1", "width > 'x'", "caption > 5", "width == None",
        "width + 1 > 2", "'rose' in width", "id in ()", "id in ('a', 1)", "id in (width, 1)", "width in 5",
        "width is 5",
        "width > 1; id == 'a'", "x := 5", "lambda: 1", "[i for i in id]", "width if ok else id", "f'{id}' == 'a'",
        "caption.startswith()", "caption.startswith('a', 'b')", "caption.startswith(prefix='a')",
        "caption.upper() == 'A'",
        "caption.startswith.__class__('a')", "id.__class__ == 1", "().__class__.__bases__[0].__subclasses__()",
        "__import__('os').system('touch ran')", "open('ran', 'w')", "exec('1')", "b'x' in caption", "width > 1j",
        f"width == {2**80}", "width == 1e999 and 'x'", "ok and 5", "not width", "\0", "width > 1\nid",
        "(" * 500 + "ok" + ")" * 500,
        "not " * 450 + "wdth", "-" * 1500 + "1 == width", " or ".join(["ok"] * 400) + " or wdth == 1",
        "ok or " * 700 + "ok",
        "\ud800 == 1", "width == '\ud800'",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused_with_words_and_nothing_is_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WhereError, match="--where"):
        mask(TABLE, parse_where(text, TABLE.column_names))
    assert list(tmp_path.iterdir()) == []


def test_a_long_condition_that_is_allowed_does_not_end_the_process() -> None:
    for text in (" or ".join(["ok"] * 330), "not " * 90 + "ok", "(" * 90 + "ok" + ")" * 90):
        mask(TABLE, parse_where(text, TABLE.column_names))
