"""Folders and object stores give the same rows and bytes; a store's faults are told from missing items."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from llmvis.schema import ItemError, Reason
from llmvis.sources import SourceError
from llmvis.sources.files import BUFFER, WINDOW, LocalFiles, in_order
from llmvis.sources.objects import ArrowFiles
from llmvis.storage import StorageError, s3_client
from tests.stores import Faulty, as_bucket, read, rows


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def arrow(folder: Path) -> ArrowFiles:
    return ArrowFiles(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), "", "s3://b")


def test_a_folder_has_one_listing_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(
        tmp_path, "b.jpg", "a/2.png", "a/10.png", "a.jpg", "a!x.jpg", "a/sub/x.gif", ".hidden/y.jpg", "c.json"
    )
    files(tmp_path, "a.txt", "new\nline.jpg", "多.jpg")
    local = rows(str(tmp_path))
    assert [r["path"] for r in local][:4] == ["a!x.jpg", "a.jpg", "a/10.png", "a/2.png"]
    bucket = as_bucket(tmp_path, monkeypatch)
    assert rows(bucket) == local
    assert read(bucket, local) == [r["path"].encode() for r in local]
    assert rows(f"{bucket}/a")[0]["path"] == "10.png"


@pytest.mark.parametrize("kind", ["bytes", "structs", "paths"])
def test_parquet_is_the_same_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    files(tmp_path, "pics/a.jpg", "pics/b.jpg")
    names = ["pics/a.jpg", "pics/b.jpg", "../x.jpg", "pics/none.jpg", None]
    if kind == "bytes":
        column = pa.array([b"1", b"2", None, b"4", b"5"])
    elif kind == "structs":
        column = pa.StructArray.from_arrays([pa.nulls(5, pa.binary()), pa.array(names)], ["bytes", "path"])
    else:
        column = pa.array(names)
    pq.write_table(
        pa.table({"image": column, "text": list("abcde")}), tmp_path / "t.parquet", row_group_size=2
    )
    local = rows(str(tmp_path / "t.parquet"))
    bucket = as_bucket(tmp_path, monkeypatch)
    far = rows(f"{bucket}/t.parquet")
    words = {"detail": None}  # of an unsafe path, which names the root
    assert [r | words for r in far] == [r | words for r in local]
    found = read(f"{bucket}/t.parquet", far)
    assert found == read(str(tmp_path / "t.parquet"), local)
    assert (
        found
        == {
            "bytes": [b"1", b"2", Reason.EMPTY, b"4", b"5"],
            "structs": [b"pics/a.jpg", b"pics/b.jpg", Reason.UNSAFE_PATH, Reason.MISSING, Reason.EMPTY],
            "paths": [b"pics/a.jpg", b"pics/b.jpg", Reason.UNSAFE_PATH, Reason.MISSING, Reason.EMPTY],
        }[kind]
    )


def test_an_imagefolder_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "train/00.jpg", "test/a.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n00.jpg,007\n../../x,evil\n")
    found = [(r["path"], r["caption"], r["reason"]) for r in rows(as_bucket(tmp_path, monkeypatch))]
    assert found == [
        ("test/a.jpg", None, None),
        ("train/00.jpg", "007", None),
        ("train/../../x", "evil", "unsafe_path"),
    ]


def test_an_object_that_vanishes_or_changes_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    bucket = as_bucket(tmp_path, monkeypatch)
    listed = rows(bucket)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"longer than before")
    os.utime(tmp_path / "c.jpg", ns=(1, 1))
    assert read(bucket, listed) == [Reason.MISSING, Reason.CHANGED, Reason.CHANGED, b"d.jpg"]


def test_a_fault_that_passes_is_waited_for_and_one_that_stays_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, "a.jpg", "b.jpg")
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "t.parquet")

    monkeypatch.setattr(s3_client, "PATIENCE_S", 0.5)
    monkeypatch.setattr(s3_client, "FIRST_WAIT_S", 0.01)
    faulty: list[Faulty] = []
    bucket = as_bucket(tmp_path, monkeypatch, lambda fs: faulty.append(Faulty(fs)) or faulty[0])
    for images in (bucket, f"{bucket}/t.parquet"):
        listed = rows(images)
        faulty[0].faults = 2
        assert read(images, listed) == ([b"a.jpg", b"b.jpg"] if images == bucket else [b"1", b"2"])
        assert faulty[0].faults == 0
        faulty[0].faults = 10**6
        with pytest.raises(StorageError, match=r"run the job again when it does.*SLOW_DOWN"):
            read(images, listed)
        faulty[0].faults = 0


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="s3://bucket/none does not exist"):
        rows(f"{as_bucket(tmp_path, monkeypatch)}/none")


def test_small_objects_are_fetched_many_at_a_time_in_order_and_no_more_than_the_window() -> None:
    lock, at_work, most, begun = threading.Lock(), [0], [0], [0]

    def call(number: int) -> int:
        with lock:
            at_work[0] += 1
            begun[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.01 if number % 3 else 0.03)
        with lock:
            at_work[0] -= 1
        return number

    found = in_order(call, range(100), WINDOW)
    assert next(found) == 0
    assert begun[0] <= WINDOW
    assert list(found) == list(range(1, 100))
    assert 4 < most[0] <= WINDOW


def test_a_file_of_a_store_reads_and_seeks_as_a_local_one(tmp_path: Path) -> None:
    data = os.urandom(BUFFER + 1000)
    (tmp_path / "x.tar").write_bytes(data)
    for buffer in (0, BUFFER):
        with arrow(tmp_path).open(b"x.tar", buffer) as file:
            assert file.read(5) == data[:5]
            file.seek(BUFFER - 2)
            assert file.read(10) == data[BUFFER - 2 : BUFFER + 8]
            file.seek(-3, os.SEEK_END)
            assert file.read() == data[-3:]
    with pytest.raises(ItemError, match="missing"):
        arrow(tmp_path).open(b"none")


def test_a_name_in_a_table_cannot_leave_the_root(tmp_path: Path) -> None:
    files(tmp_path, "in/a.jpg", "secret.jpg")
    (tmp_path / "in" / "door").symlink_to(tmp_path)
    for place in (LocalFiles(str(tmp_path / "in")), arrow(tmp_path / "in")):
        for name in ("../secret.jpg", "/etc/passwd", "x/../../secret.jpg", "nul\0", "s3://other/a.jpg"):
            try:
                assert place.place(name) == b"s3:/other/a.jpg", name  # locally a folder like any other
            except ItemError as error:
                assert error.reason == Reason.UNSAFE_PATH
        assert place.place("b/../a.jpg") == b"a.jpg"
    assert arrow(tmp_path).place("s3://b/in/a.jpg") == b"in/a.jpg"
    local = LocalFiles(str(tmp_path / "in"))
    assert local.place(str(tmp_path / "in" / "a.jpg")) == b"a.jpg"
    with pytest.raises(ItemError, match="unsafe_path"):
        local.place("door/secret.jpg")
