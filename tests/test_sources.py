"""Listings are canonical and complete; readers give bytes or a reason, never an exception."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmvis.schema import ItemError, Reason, item_id
from llmvis.sources import SourceError, SourceOptions, open_reader, open_source
from llmvis.sources import base as sources_base


def rows(folder: Path, **options: Any) -> list[dict[str, Any]]:
    source = open_source(str(folder), SourceOptions(**options))
    return [row for chunk in source.listing() for row in chunk.to_pylist()]


def contents(folder: Path, **options: Any) -> list[bytes | Reason]:
    """What the reader gives for every row of the listing."""
    source = open_source(str(folder), SourceOptions(**options))
    reader = pickle.loads(pickle.dumps(open_reader(source.describe())))
    listed = [row for chunk in source.listing() for row in chunk.to_pylist()]
    found = reader.read([r["locator"] for r in listed], [(r["size"], r["mtime_ns"]) for r in listed])
    return [data.reason if isinstance(data, ItemError) else data for data in found]


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_a_folder_is_listed_depth_first_in_byte_order(tmp_path: Path) -> None:
    files(
        tmp_path, "b.jpg", "a/2.png", "a/10.png", "a.jpg", "Z.jpg", "a/sub/x.gif", ".hidden/y.jpg", "a/.y.jpg"
    )
    names = ["Z.jpg", "a.jpg", "a/10.png", "a/2.png", "a/sub/x.gif", "b.jpg"]
    assert [r["path"] for r in rows(tmp_path)] == names
    assert [r["id"] for r in rows(tmp_path)] == [item_id(n.encode()) for n in names]
    assert contents(tmp_path) == [n.encode() for n in names]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    files(tmp_path, "here/a.jpg", "there/a.jpg")
    assert rows(tmp_path / "here")[0]["id"] == rows(tmp_path / "there")[0]["id"]


def test_captions_lie_beside_pictures_and_other_sidecars_are_counted(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "a.txt", "b.jpg", "notes.md", "c.json")
    source = open_source(str(tmp_path))
    listed = [row for chunk in source.listing() for row in chunk.to_pylist()]
    assert [(r["path"], r["caption_locator"]) for r in listed] == [("a.jpg", b"a.txt"), ("b.jpg", None)]
    assert source.notes() == ["1 .json files passed over", "1 .md files passed over"]


def test_names_are_bytes(tmp_path: Path) -> None:
    odd = [b"new\nline.jpg", b"not-utf8-\xff.jpg", "多.jpg".encode()]
    for name in odd:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(name)
    assert sorted(contents(tmp_path)) == sorted(odd)
    assert {r["path"] for r in rows(tmp_path)} == {"new\nline.jpg", "not-utf8-\\xff.jpg", "多.jpg"}


def test_links_are_not_followed_out_and_inner_ones_are_the_same_item(tmp_path: Path) -> None:
    files(tmp_path, "in/a.jpg", "out/secret.jpg")
    inside = tmp_path / "in"
    (inside / "same.jpg").symlink_to("a.jpg")
    (inside / "dangling.jpg").symlink_to("nowhere")
    (inside / "loop").symlink_to("loop")
    (inside / "outside.jpg").symlink_to(tmp_path / "out" / "secret.jpg")
    (inside / "folder").symlink_to(inside)
    os.mkfifo(inside / "pipe")
    found = {r["path"] if r["reason"] else f"ok {r['path']}": r["reason"] for r in rows(inside)}
    links = dict.fromkeys(["dangling.jpg", "loop", "outside.jpg", "folder"], "link")
    assert found == {"ok a.jpg": None, "ok pipe": None} | links
    assert [r["path"] for r in rows(inside)].count("a.jpg") == 2
    assert Reason.UNREADABLE in contents(inside)  # the pipe; opening it must not block


def test_a_file_that_vanishes_or_changes_after_the_plan_has_a_reason(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    listed = rows(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"longer than before")
    reader = open_reader(open_source(str(tmp_path)).describe())
    found = list(reader.read([r["locator"] for r in listed], [(r["size"], r["mtime_ns"]) for r in listed]))
    assert [f.reason if isinstance(f, ItemError) else f for f in found] == [
        Reason.MISSING,
        Reason.CHANGED,
        b"c.jpg",
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_imagefolder_brings_captions_and_columns(tmp_path: Path, ending: str) -> None:
    files(tmp_path, "a.jpg", "sub/b.jpg", "extra.jpg")
    table = pa.table(
        {
            "file_name": ["sub/b.jpg", "a.jpg", "gone.jpg", "../../etc/passwd", "a.jpg"],
            "text": ["bee", "ay", "gone", "evil", "twice"],
            "stars": [5, 4, 3, 2, 1],
        }
    )
    if ending == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in table.to_pylist()))
    elif ending == "csv":
        import pyarrow.csv

        pyarrow.csv.write_csv(table, tmp_path / "metadata.csv")
    else:
        pq.write_table(table, tmp_path / "metadata.parquet")
    found = [(r["path"], r["caption"], r["stars"], r["reason"]) for r in rows(tmp_path)]
    assert found == [
        ("a.jpg", "ay", 4, None),
        ("a.jpg", "twice", 1, None),
        ("extra.jpg", None, None, None),
        ("sub/b.jpg", "bee", 5, None),
        ("gone.jpg", "gone", 3, "missing"),
        ("../../etc/passwd", "evil", 2, "unsafe_path"),
    ]


def test_the_folders_of_an_imagefolder_have_their_own_tables(tmp_path: Path) -> None:
    files(tmp_path, "train/00.jpg", "test/a.jpg", "test/b.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption,stars\n00.jpg,007,1\n")
    (tmp_path / "test" / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "caption": "2020-01-01", "stars": 2}'
    )
    found = [(r["path"], r["caption"], r["stars"]) for r in rows(tmp_path)]
    assert found == [("test/a.jpg", "2020-01-01", 2), ("test/b.jpg", None, None), ("train/00.jpg", "007", 1)]


def test_a_link_in_an_imagefolder_keeps_its_own_row(tmp_path: Path) -> None:
    files(tmp_path, "store/a.jpg")
    (tmp_path / "b.jpg").symlink_to("store/a.jpg")
    (tmp_path / "metadata.csv").write_text('file_name,text\nb.jpg,"two\nlines"\n')
    found = [(r["path"], r["caption"], r["reason"]) for r in rows(tmp_path)]
    assert found == [("store/a.jpg", "two\nlines", None), ("store/a.jpg", None, None)]


@pytest.mark.parametrize(
    ("column", "captions"),
    [
        (pa.array([["a", "b"], [], None]), ["a", None, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"\xff", None], pa.binary()), ["a", "\ufffd", None]),
        (pa.array([1, 2, None]), ["1", "2", None]),
    ],
)
def test_captions_of_any_plain_kind(tmp_path: Path, column: pa.Array, captions: list[str | None]) -> None:
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "note": column}), tmp_path / "x.parquet")
    assert [r["caption"] for r in rows(tmp_path / "x.parquet", caption_column="note")] == captions


def test_a_number_is_no_caption_unless_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "label": [3]}), tmp_path / "x.parquet")
    (row,) = rows(tmp_path / "x.parquet")
    assert (row["caption"], row["label"]) == (None, 3)


def test_a_downloaded_data_set_with_a_cache_folder_is_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "x.parquet")
    files(tmp_path, ".cache/huggingface/x.parquet.metadata", "README.md")
    assert contents(tmp_path) == [b"1"]


def test_parquet_flags_on_a_folder_of_pictures_are_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg", "t.parquet")
    with pytest.raises(SourceError, match=r"give the \.parquet file itself"):
        rows(tmp_path, image_column="path")


def test_parquet_bytes_structs_and_paths(tmp_path: Path) -> None:
    files(tmp_path, "pics/a.jpg")
    structs = pa.StructArray.from_arrays(
        [pa.array([b"1", None, None], pa.binary()), pa.array(["x", "pics/a.jpg", None])], ["bytes", "path"]
    )
    pq.write_table(pa.table({"image": structs, "text": ["one", "two", None]}), tmp_path / "s.parquet")
    assert contents(tmp_path / "s.parquet") == [b"1", b"pics/a.jpg", Reason.EMPTY]
    pq.write_table(pa.table({"n": [1, 2], "jpg": [b"1", b"2"]}), tmp_path / "b.parquet")
    assert contents(tmp_path / "b.parquet") == [b"1", b"2"]
    paths = ["pics/a.jpg", "../x", None, "pics/none.jpg", "pics/a.jpg"]
    pq.write_table(pa.table({"path": paths, "caption": list("abcde")}), tmp_path / "p.parquet")
    listed = rows(tmp_path / "p.parquet")
    assert [r["reason"] for r in listed] == [None, "unsafe_path", "empty", "missing", None]
    assert listed[0]["id"] == listed[4]["id"]


def test_many_row_groups_come_back_in_order(tmp_path: Path) -> None:
    table = pa.table({"image": [b"%d" % i for i in range(1000)], "key": [f"k{i}" for i in range(1000)]})
    pq.write_table(table.slice(0, 600), tmp_path / "0.parquet", row_group_size=170)
    pq.write_table(table.slice(600), tmp_path / "1.parquet", row_group_size=170)
    assert contents(tmp_path, id_column="key") == [b"%d" % i for i in range(1000)]
    assert rows(tmp_path, id_column="key")[7]["id"] == item_id(b"k7")
    assert rows(tmp_path)[601]["path"] == "1.parquet#1"


def test_a_table_that_lacks_the_column_stops_the_job_before_it_starts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "text": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "1.parquet")
    with pytest.raises(SourceError, match=r"1\.parquet has no column 'text'"):
        open_source(str(tmp_path))
    pq.write_table(pa.table({"image": [b"1"], "text": [1]}), tmp_path / "1.parquet")
    with pytest.raises(SourceError, match="int64"):
        open_source(str(tmp_path))


def test_tables_may_order_their_columns_differently_lack_some_and_widen_numbers(tmp_path: Path) -> None:
    first = {"image": [b"1"], "text": ["a"], "stars": pa.array([1], pa.int32()), "only_here": ["x"]}
    pq.write_table(pa.table(first), tmp_path / "0.parquet")
    second = {"later": [0.5], "stars": pa.array([2**40], pa.int64()), "text": ["b"], "image": [b"2"]}
    pq.write_table(pa.table(second), tmp_path / "1.parquet")
    source = open_source(str(tmp_path))
    found = [row for chunk in source.listing() for row in chunk.to_pylist()]
    assert [(r["caption"], r["stars"], r["only_here"], r["later"]) for r in found] == [
        ("a", 1, "x", None),
        ("b", 2**40, None, 0.5),
    ]
    assert contents(tmp_path) == [b"1", b"2"]
    assert source.notes() == [
        "column 'only_here' is not in 1 of 2 tables: null there",
        "column 'later' is not in 1 of 2 tables: null there",
    ]


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("stars", pa.array(["many"]), "1.parquet: column 'stars' is string, in .*0.parquet it is int64"),
        ("stars", pa.array([1.5]), "column 'stars' is double"),
        ("image", pa.array(["a.jpg"]), "column 'image' is string"),
    ],
)
def test_columns_that_cannot_be_one_are_refused_before_the_work(
    tmp_path: Path, column: str, values: pa.Array, words: str
) -> None:
    table = pa.table({"image": [b"1"], "stars": [1]})
    pq.write_table(table, tmp_path / "0.parquet")
    pq.write_table(table.set_column(table.column_names.index(column), column, values), tmp_path / "1.parquet")
    with pytest.raises(SourceError, match=words):
        open_source(str(tmp_path))


def test_a_table_that_vanishes_gives_its_rows_a_reason(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "0.parquet")
    description = open_source(str(tmp_path)).describe()
    (tmp_path / "0.parquet").unlink()
    found = list(open_reader(description).read([b"0:0:0", b"0:0:1"], [(None, None)] * 2))
    assert [f.reason for f in found if isinstance(f, ItemError)] == [Reason.MISSING] * 2


def test_odd_names_and_links_in_a_table_of_paths(tmp_path: Path) -> None:
    files(tmp_path, "in/new\nline.jpg", "in/多.jpg", "secret.jpg")
    (tmp_path / "in" / "out.jpg").symlink_to("../secret.jpg")
    (tmp_path / "in" / "loop.jpg").symlink_to("loop.jpg")
    names = ["new\nline.jpg", "多.jpg", "out.jpg", "loop.jpg", "nul\0.jpg"]
    pq.write_table(pa.table({"path": names}), tmp_path / "in" / "t.parquet")
    assert [r["reason"] for r in rows(tmp_path / "in" / "t.parquet")] == [
        None, None, "unsafe_path", "link", "unsafe_path",
    ]  # fmt: skip
    found = contents(tmp_path / "in" / "t.parquet")
    assert found[:2] == [b"in/new\nline.jpg", "in/多.jpg".encode()]
    assert not any(isinstance(data, bytes) for data in found[2:])


def test_a_name_with_a_newline_has_its_row_in_an_imagefolder(tmp_path: Path) -> None:
    files(tmp_path, "new\nline.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"not-utf8-\xff.jpg"), "wb") as file:
        file.write(b"odd")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "new\nline.jpg", "text": "two lines"}))
    assert [(r["path"], r["caption"]) for r in rows(tmp_path)] == [
        ("new\nline.jpg", "two lines"),
        ("not-utf8-\\xff.jpg", None),
    ]
    assert contents(tmp_path) == [b"new\nline.jpg", b"odd"]


def test_a_changed_table_is_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "0.parquet")
    description = open_source(str(tmp_path)).describe()
    pq.write_table(pa.table({"image": [b"3", b"4", b"5"]}), tmp_path / "0.parquet")
    found = list(open_reader(description).read([b"0:0:0", b"0:0:1"], [(None, None)] * 2))
    assert [f.reason for f in found if isinstance(f, ItemError)] == [Reason.CHANGED] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_bytes(b"x"), "takes a folder"),
    ],
)
def test_what_is_no_collection_is_refused_with_words(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(SourceError, match=words):
        open_source(str(path))


def test_a_users_columns_keep_their_names_unless_taken() -> None:
    fields = [pa.field(name, pa.int8(), nullable=False) for name in ("stars", "id", "source_id", "score")]
    carried = sources_base.carried(fields, "x")
    assert [f.name for f in carried] == ["stars", "source_source_id", "source_id", "source_score"]
    assert all(f.nullable for f in carried)
    with pytest.raises(SourceError, match="two columns called 'a'"):
        sources_base.carried([pa.field("a", pa.int8())] * 2, "x")
    assert not sources_base.can_carry(pa.struct([]))
    assert not sources_base.can_carry(pa.struct([("bytes", pa.binary())]))


def test_tables_are_ordered_folder_by_folder_and_links_to_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("train/0", "train-more/0", "train/1", "Z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [name.encode()]}), tmp_path / f"{name}.parquet")
    (tmp_path / "again").symlink_to("train")
    assert contents(tmp_path) == [b"Z", b"train/0", b"train/1", b"train-more/0"]
