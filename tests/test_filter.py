"""`llmvis filter` copies pictures as they are, and others' readers and ours read what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from PIL import Image

from llmvis import cli
from llmvis.config import FilterConfig
from llmvis.filtered import copy_pictures
from llmvis.images import decode
from llmvis.index import IndexInfo, build, open_index
from llmvis.ledger import read_data, read_manifest
from llmvis.schema import UserError
from llmvis.search import Query, query_vector, search
from llmvis.sources import open_reader, open_source
from llmvis.storage import LocalStore, StorageError

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}


@pytest.fixture
def idx(tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain pictures of five colours in five formats, one of them twice, encoded and indexed by the real jobs."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for kind, (name, colour) in zip(ENDINGS, tiny.COLOURS.items(), strict=True):
        # names that say nothing of what is in them
        Image.new("RGB", (20, 10), colour).save(images / f"{name}.png", kind)
        rows.append({"file_name": f"{name}.png", "caption": f"all {name}", "stars": len(name), "score": 1.5})
    Image.new("RGB", (9, 9), (255, 50, 50)).save(images / "crimson.png")
    rows.append({"file_name": "crimson.png", "caption": None, "stars": 9, "score": 2.5})
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.run(str(images), str(tmp_path / "enc"))
    encoded = LocalStore(tmp_path / "enc")
    manifest = read_manifest(encoded, "encode")
    info = IndexInfo(model=manifest["model"], source=manifest["source"])
    build(LocalStore(tmp_path / "idx"), info, (read_data(encoded, f) for f in manifest["files"]))
    monkeypatch.setattr(cli, "load_encoder", tiny.load)
    return str(tmp_path / "idx")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_pictures_are_copied_byte_for_byte_under_their_right_ending(
    idx: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "more" / "all"
    cli.run_filter(FilterConfig(index=idx, text="red", out=str(out)))
    assert "filter plan: 6 of 6 pictures" in capsys.readouterr().out
    rows = {Path(row["path"]).stem: row for row in rows_of(out)}
    assert set(rows) == {*tiny.COLOURS, "crimson"}
    for kind, name in zip(ENDINGS, tiny.COLOURS, strict=True):
        row = rows[name]
        assert row["file_name"] == f"images/{row['id']}.{ENDINGS[kind]}"
        assert (out / row["file_name"]).read_bytes() == (tmp_path / "images" / f"{name}.png").read_bytes()
        assert (row["caption"], row["stars"], row["source_score"]) == (f"all {name}", len(name), 1.5)
    assert rows["red"]["score"] == pytest.approx(1, abs=1e-2)
    assert rows["red"]["score"] > rows["green"]["score"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["all"]


def test_what_it_leaves_is_read_by_datasets_and_by_our_own_reader(idx: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli.run_filter(FilterConfig(index=idx, text="red", out=str(out)))
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache")
    )
    found = {row["caption"]: row["image"].convert("RGB").getpixel((0, 0)) for row in loaded}
    assert found["all blue"][2] > 250 and len(loaded) == 6
    source = open_source(str(out))
    (listed,) = source.listing()
    assert set(listed["caption"].to_pylist()) == {None, *(f"all {name}" for name in tiny.COLOURS)}
    for data in open_reader(source.describe()).read(listed["locator"].to_pylist()):
        assert isinstance(data, bytes) and decode(data).width in (20, 9)


def test_flags_choose_what_is_copied(idx: str, tmp_path: Path) -> None:
    def copied(name: str, **flags: Any) -> set[str]:
        cli.run_filter(FilterConfig(index=idx, out=str(tmp_path / name), **{"text": "red", **flags}))
        return {Path(row["path"]).stem for row in rows_of(tmp_path / name)}

    assert copied("a", min_score=0.9) == {"red", "crimson"}
    assert copied("b", most=1) == {"red"}
    assert copied("c", min_score=0.9, distinct=0.95) == {"red"}
    assert copied("d", where="stars == 4", most=5) == {"blue"}
    assert copied("e", text=None, image=str(tmp_path / "images" / "green.png"), most=1) == {"green"}
    assert "red" not in copied("f", text="white red", not_=("red",), most=2)


def test_what_cannot_be_read_is_counted_and_left_out(
    idx: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "green.png").unlink()
    (tmp_path / "images" / "blue.png").write_bytes(b"<html>")
    cli.run_filter(FilterConfig(index=idx, text="red", out=str(tmp_path / "out")))
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        f"filter: 4 pictures in {tmp_path / 'out'}", "       1 missing", "       1 not_an_image"
    ]  # fmt: skip
    assert len(rows_of(tmp_path / "out")) == len(list((tmp_path / "out" / "images").iterdir())) == 4


def test_a_folder_with_anything_in_it_is_left_alone(idx: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(StorageError, match="not empty; choose a new folder"):
        cli.run_filter(FilterConfig(index=idx, text="red", out=str(tmp_path / "out")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"the best has 1\.0"):
        cli.run_filter(
            FilterConfig(index=idx, text="red", where="stars == 3", min_score=1.0, out=str(tmp_path / "none"))
        )
    assert not (tmp_path / "none").exists()


def test_a_copy_that_is_interrupted_leaves_nothing(
    idx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmvis.export._write_picture", stop)
    with open_index(idx) as index, pytest.raises(KeyboardInterrupt):
        (hits,) = search(index, query_vector(Query(text="red"), tiny.TinyEncoder()), 3)
        copy_pictures(index.sources, hits, str(tmp_path / "some" / "out"))
    assert list((tmp_path / "some").iterdir()) == []
