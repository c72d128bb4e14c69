"""What img2dataset made reads the same in all its formats; failed downloads are dead letters with their reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmvis.schema import Reason, item_id
from llmvis.sources import SourceError, open_source
from tests.made_by_img2dataset import make, picture, shard_rows
from tests.stores import as_bucket, read, rows

FORMS = ("files", "webdataset", "parquet", "tfrecord")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["local", "store"])
def test_every_format_gives_rows_pictures_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, where: str
) -> None:
    make(tmp_path / "out", form)
    images = str(tmp_path / "out") if where == "local" else f"{as_bucket(tmp_path, monkeypatch)}/out"
    made = [row for shard in range(2) for row in shard_rows(shard)]
    listed = rows(images)
    assert [r["id"] for r in listed] == [item_id(row["key"].encode()) for row in made]
    assert [(r["caption"], r["stars"], r["source_width"]) for r in listed] == [
        (row["caption"], row["stars"], row["width"]) for row in made
    ]
    good = [row["status"] == "success" for row in made]
    assert read(images, listed) == [
        picture(row["key"]) if fine else Reason.MISSING for row, fine in zip(made, good, strict=True)
    ]
    told = {r["detail"] for r in listed if r["reason"]}
    assert told == {
        "img2dataset: failed_to_download: HTTP Error 404: File not found",
        "img2dataset: failed_to_resize: Image decoding error",
    }


def test_the_format_without_pictures_is_refused_with_words(tmp_path: Path) -> None:
    make(tmp_path / "out", "dummy")
    with pytest.raises(SourceError, match=r"`dummy`.*--output_format"):
        open_source(str(tmp_path / "out"))


def test_a_shard_that_was_not_finished_is_passed_over_with_a_note(tmp_path: Path) -> None:
    make(tmp_path / "out", "webdataset")
    (tmp_path / "out" / "00001_stats.json").unlink()
    (tmp_path / "out" / "00001.parquet").write_bytes(b"PAR1 half")
    source = open_source(str(tmp_path / "out"))
    assert sum(map(len, source.listing())) == 6
    assert source.notes() == ["1 shards that img2dataset did not finish are passed over: run it again"]


def test_a_finished_shard_without_its_table_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out", "files")
    (tmp_path / "out" / "00001.parquet").unlink()
    with pytest.raises(SourceError, match=r"00001\.parquet is not there"):
        open_source(str(tmp_path / "out"))


@pytest.mark.parametrize("form", ["files", "webdataset", "tfrecord"])
def test_pictures_and_rows_that_lack_each_other_are_told(tmp_path: Path, form: str) -> None:
    make(tmp_path / "out", form, shards=1)
    path = tmp_path / "out" / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 3), path)  # keys 5 (failed), 4, 3: the pictures 1 and 0 have no row
    lost = shutil.copytree(tmp_path / "out", tmp_path / "lost") / "00000"
    listed = rows(str(tmp_path / "out"))
    assert sorted(r["path"].rpartition("/")[2].rpartition("#")[2] for r in listed[3:]) == [
        "000000000.jpg",
        "000000001.jpg",
    ]
    assert read(str(tmp_path / "out"), listed)[1:3] == [picture("000000004"), picture("000000003")]
    shutil.rmtree(lost) if form == "files" else lost.with_suffix(
        f".{ {'webdataset': 'tar'}.get(form, form) }"
    ).unlink()
    if form == "files":
        lost.mkdir()
        assert [r["reason"] for r in rows(str(tmp_path / "lost"))] == ["missing"] * 3


def test_a_damaged_record_is_a_dead_letter_and_a_damaged_length_ends_the_file(tmp_path: Path) -> None:
    make(tmp_path / "out", "tfrecord", shards=1)
    path = tmp_path / "out" / "00000.tfrecord"
    listed, data = rows(str(tmp_path / "out")), path.read_bytes()
    at = data.index(picture("000000003"))
    path.write_bytes(data[:at] + b"P" + data[at + 1 :])
    listed = rows(str(tmp_path / "out"))
    by_key = dict(zip([r["key"] for r in listed], read(str(tmp_path / "out"), listed), strict=True))
    assert by_key["000000003"] == Reason.CORRUPT
    assert by_key["000000004"] == picture("000000004")
    second = 12 + int.from_bytes(data[:8], "little") + 4
    path.write_bytes(data[:second] + b"\xff" + data[second + 1 :])
    listed = rows(str(tmp_path / "out"))
    assert [r["reason"] for r in listed].count(None) == 1
    assert listed[-1]["detail"] == f"byte {second:,}: no TFRecord, or a damaged length; the rest is not read"
    path.write_bytes(data[: second + 40])
    assert rows(str(tmp_path / "out"))[-1]["reason"] == "truncated"


def test_tfrecords_alone_are_refused_with_words(tmp_path: Path) -> None:
    make(tmp_path / "out", "tfrecord", shards=1)
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(SourceError, match="img2dataset"):
        open_source(str(tmp_path / "out"))


def test_what_a_reader_is_told_can_be_written_as_json(tmp_path: Path) -> None:
    for form in FORMS:
        make(tmp_path / form, form, shards=1)
        told: dict[str, Any] = json.loads(json.dumps(open_source(str(tmp_path / form)).describe()))
        assert told["layout"] == "img2dataset"
