"""Webdataset tars are read in place; what is odd in one is a dead letter and never a path."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset

from llmvis.schema import Reason
from llmvis.sources import SourceError, open_source
from llmvis.sources.files import LocalFiles
from tests.stores import as_bucket, read, rows


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, text: str = "", **columns: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    picture = member(f"{key}.jpg", f"picture {key}".encode())
    return [picture, member(f"{key}.txt", text.encode()), member(f"{key}.json", json.dumps(columns).encode())]


@pytest.mark.parametrize("where", ["local", "store"])
def test_a_tar_of_webdataset_gives_a_row_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05}.tar")) as out:
            for i in range(4):
                json_ = {"stars": i, "ratio": 1 if i else 0.5, "tags": ["a"], "ok": True}
                out.write(
                    {"__key__": f"a/{shard}{i}", "jpg": b"p%d%d" % (shard, i), "txt": f"t{i}", "json": json_}
                )
    images = str(tmp_path) if where == "local" else as_bucket(tmp_path, monkeypatch)
    listed = rows(images)
    assert [r["path"] for r in listed[:2]] == ["00000.tar#a/00.jpg", "00000.tar#a/01.jpg"]
    assert [(r["caption"], r["stars"], r["ratio"], r["tags"], r["ok"]) for r in listed[4:6]] == [
        ("t0", 0, 0.5, '["a"]', True),
        ("t1", 1, 1.0, '["a"]', True),
    ]
    assert read(images, listed) == [b"p%d%d" % (s, i) for s in range(3) for i in range(4)]
    assert rows(f"{images}/00001.tar") == listed[4:8]
    assert len({r["id"] for r in listed}) == 12


def test_members_of_a_sample_may_lie_apart_and_the_plain_picture_counts(tmp_path: Path) -> None:
    apart = [
        member("a.mask.png", b"mask"),
        member("a.JPG", b"a"),
        member("b.png", b"b"),
        member("a.caption", b"A"),
    ]
    tar(
        tmp_path / "x.tar",
        *apart,
        member("b.txt", b"\xef\xbb\xbfB \xff"),
        member("README"),
        member(".hid.jpg"),
    )
    listed = rows(str(tmp_path / "x.tar"))
    assert [(r["path"], r["caption"]) for r in listed] == [("x.tar#a.JPG", "A"), ("x.tar#b.png", "B \ufffd")]
    assert read(str(tmp_path), listed) == [b"a", b"b"]
    source = open_source(str(tmp_path))
    list(source.listing())
    assert source.notes() == ["2 members without a key and an ending passed over"]


def test_names_that_lead_somewhere_links_and_devices_are_dead_letters(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9", "GNU.sparse.name": "sparse.jpg"}
    evil = [
        member("../../evil.jpg", b"x"), member("a/../b.jpg", b"x"),
        member("/abs.jpg", b"x"), member("n\0l\n.jpg", b"x"),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"),
        member("device.jpg", type=tarfile.CHRTYPE), member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("sparse.jpg", b"abc", pax_headers=sparse),
    ]  # fmt: skip
    evil[3][0].pax_headers = {"path": "n\0l\n.jpg"}
    tar(
        tmp_path / "x.tar",
        *evil,
        *sample("good"),
        member("link.jpg", b"ok"),
        member("link.txt", type=tarfile.SYMTYPE),
    )
    listed = rows(str(tmp_path))
    assert [r["reason"] for r in listed] == ["unsafe_path"] * 9 + [None, "unsafe_path"]
    assert all("\n" not in r["path"] and "\0" not in r["path"] for r in listed)
    assert read(str(tmp_path), listed)[9] == b"picture good"
    assert not (tmp_path.parent / "evil.jpg").exists()


def test_each_repetition_of_a_key_is_a_dead_letter_of_its_own(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", *sample("a", "first"), *sample("b"), *sample("a", "again"), *sample("a", "third"))
    listed = rows(str(tmp_path))
    assert [(r["caption"], r["reason"]) for r in listed] == [
        ("first", None), ("", None), (None, "duplicate_key"), (None, "duplicate_key"),
    ]  # fmt: skip
    assert len({r["id"] for r in listed}) == 4
    assert read(str(tmp_path), listed)[:2] == [b"picture a", b"picture b"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_odd_names_work(tmp_path: Path, form: int) -> None:
    names = ["d" * 90 + "/" + "k" * 250, "new\nline", "多", "not-utf8-\udcff"]
    tar(tmp_path / "x.tar", *(member(f"{name}.jpg", b"%d" % i) for i, name in enumerate(names)), form=form)
    listed = rows(str(tmp_path))
    assert read(str(tmp_path), listed) == [b"0", b"1", b"2", b"3"]
    assert [r["path"] for r in listed[1:]] == [
        "x.tar#new\nline.jpg",
        "x.tar#多.jpg",
        "x.tar#not-utf8-\\xff.jpg",
    ]


def test_the_names_of_tars_are_bytes(tmp_path: Path) -> None:
    odd = os.path.join(os.fsencode(tmp_path), b"a:\n\xff.tar")
    os.rename(tar(tmp_path / "x.tar", *sample("a")), odd)
    listed = rows(str(tmp_path))
    assert listed[0]["path"] == "a:\n\\xff.tar#a.jpg"
    assert read(str(tmp_path), listed) == [b"picture a"]


def test_a_tar_cut_anywhere_gives_what_is_whole_and_says_what_is_not(tmp_path: Path) -> None:
    whole = tar(
        tmp_path / "whole.tar", *sample("a", "t"), *sample("b", "t"), form=tarfile.USTAR_FORMAT
    ).read_bytes()
    (tmp_path / "whole.tar").unlink()
    path = tmp_path / "cut.tar"
    for size in range(0, 7 * 1024, 256):
        path.write_bytes(whole[:size])
        listed = rows(str(tmp_path))
        found = read(str(tmp_path), listed)
        good = [data for data in found if isinstance(data, bytes)]
        assert good == [b"picture a", b"picture b"][: len(good)]
        assert (size >= 3072) + (size >= 6144) <= len(good), size  # of whole samples all
        assert len(good) <= (size >= 512 + 9) + (size >= 3584 + 9), size  # and no half picture
        bad = {data for data in found if isinstance(data, Reason)}
        assert bad <= {Reason.EMPTY, Reason.TRUNCATED, Reason.CORRUPT, Reason.MISSING}
        notes = open_source(str(tmp_path))
        list(notes.listing())
        assert bad or notes.notes() or size >= 6 * 1024, size


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar")
    tar(tmp_path / "1.tar", *sample("a"))
    assert len(rows(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"<html>" * 1000, "corrupt"),
        (lambda data: data[:3072] + b"garbage!" * 500, "corrupt"),
        (lambda data: b"", "empty"),
    ],
)
def test_what_is_no_tar_or_ends_in_garbage_is_a_dead_letter(tmp_path: Path, damage: Any, reason: str) -> None:
    path = tar(tmp_path / "x.tar", *sample("a", "t"), form=tarfile.USTAR_FORMAT)
    path.write_bytes(damage(path.read_bytes()))
    tar(tmp_path / "y.tar", *sample("good"))
    listed = rows(str(tmp_path))
    assert [r["reason"] for r in listed if r["reason"]] == [reason]
    assert read(str(tmp_path), listed)[-1] == b"picture good"


@pytest.mark.parametrize("size", [-1, -1024])
def test_a_header_with_a_negative_size_ends_the_tar(tmp_path: Path, size: int) -> None:
    info, _ = member("b.txt")
    info.size = size
    tar(tmp_path / "x.tar", *sample("a", "t"))
    with (tmp_path / "x.tar").open("r+b") as file:
        file.seek(6 * 512)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    assert rows(str(tmp_path))[-1]["reason"] in ("truncated", "corrupt")


def test_a_tar_that_changes_or_vanishes_after_the_plan_has_a_reason(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tar(tmp_path / f"{name}.tar", *sample(name))
    listed = rows(str(tmp_path))
    tar(tmp_path / "a.tar", *sample("other"), *sample("a"))
    reader_of = read(str(tmp_path), listed)
    assert reader_of == [Reason.CHANGED, b"picture b", b"picture c"]
    (tmp_path / "b.tar").unlink()
    assert read(str(tmp_path), listed) == [Reason.CHANGED, Reason.MISSING, b"picture c"]


def test_values_that_do_not_fit_the_first_tars_types_are_null_and_counted(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", *sample("a", stars=1, label="x", caption="of json"), member("n.jpg", b"n"))
    later = [*sample("b", stars="two", label=7, new=1), member("c.jpg", b"c"), member("c.json", b"{not json")]
    tar(tmp_path / "1.tar", *later)
    source = open_source(str(tmp_path))
    found = [row for chunk in source.listing() for row in chunk.to_pylist()]
    assert [(r["stars"], r["label"]) for r in found] == [(1, "x"), (None, None), (None, "7"), (None, None)]
    assert source.user_columns == [pa.field("stars", pa.int64()), pa.field("label", pa.string())]
    assert source.notes() == [
        "1 samples whose .json is not valid have no columns",
        "1 values of 'stars' that are no int64: null there",
    ]
    assert rows(str(tmp_path), caption_column="caption")[0]["caption"] == "of json"


def test_compressed_tars_are_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    for images in (tmp_path, tmp_path / "x.tar.gz"):
        with pytest.raises(SourceError, match=r"compressed.*unpack it"):
            open_source(str(images))


def test_a_listing_seeks_over_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(tmp_path / "x.tar", *(member(f"{i}.jpg", bytes(1 << 20)) for i in range(8)))
    taken: list[int] = []
    honest = LocalFiles.open

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            taken.append(len(data := super().read(size)))
            return data

    def counting(self: LocalFiles, name: bytes, buffer: int = 0) -> Any:
        return Counting(honest(self, name, buffer).detach())  # type: ignore[attr-defined]

    monkeypatch.setattr(LocalFiles, "open", counting)
    assert len(rows(str(tmp_path))) == 8
    assert 8 * 512 <= sum(taken) < 100_000
