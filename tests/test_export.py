"""Data sets that we write, read by the libraries that others will read them with."""

from __future__ import annotations

import datetime
import gc
import io
import json
import math
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llmvis import export
from llmvis.export import pack_parquet, pack_webdataset, row_key, write_imagefolder
from llmvis.made import image_path, made_schema, png_bytes
from llmvis.schema import item_id
from llmvis.sources import open_reader, open_source
from tests.catalogue import photo

USER = [
    pa.field("stars", pa.float32()),
    pa.field("words", pa.list_(pa.string())),
    pa.field("day", pa.date32()),
    pa.field("old_file_name", pa.string()),
]


def made(n: int, start: int = 0, **changed: Any) -> pa.Table:
    """N made rows with real pictures, user's columns of several kinds, and captions of many scripts."""
    rows = []
    for i in range(start, start + n):
        row_id = item_id(str(i).encode())
        pixels = np.asarray(photo(12 + i % 3, 10, seed=i))
        rows.append(
            {
                "id": row_id,
                "image": {"bytes": png_bytes(pixels), "path": image_path(row_id)},
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "caption": f'picture {i}, 图片, تصوير, 🍎\n"quoted"',
                "prompt": "colour it",
                "negative": None,
                "seed": i,
                "source": f"folder/{i}.jpg",
                "source_id": item_id(b"source"),
                "model": "llmvis/synthesis",
                "model_fingerprint": "ab" * 32,
                "stars": [math.nan, 1.0, 2.5][i % 3],
                "words": [["a", "b"], [], None][i % 3],
                "day": datetime.date(2026, 1, 1 + i % 28),
                "old_file_name": "x.jpg",
                **changed,
            }
        )
    return pa.Table.from_pylist(rows, made_schema(USER))


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def load(tmp_path: Path, *args: Any, **kwargs: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), split="train", **kwargs)


def test_datasets_loads_our_parquet_with_pictures_and_all_columns(tmp_path: Path) -> None:
    table = made(7)
    for i in range(2):
        (tmp_path / f"{i}.parquet").write_bytes(pack_parquet(table.slice(4 * i, 4)))
    found = load(tmp_path, "parquet", data_files=str(tmp_path / "*.parquet"))
    assert len(found) == 7
    assert type(found.features["image"]).__name__ == "Image"
    assert found.features["seed"].dtype == "int64"
    assert found.column_names == table.column_names
    for row, original in zip(found, table.to_pylist(), strict=True):
        assert isinstance(row["image"], Image.Image)
        np.testing.assert_array_equal(np.asarray(row["image"]), pixels_of(original))
        rest = [name for name in table.column_names if name not in ("image", "stars")]
        assert {n: row[n] for n in rest} == {n: original[n] for n in rest}


def test_parquet_keeps_the_metadata_and_has_small_row_groups() -> None:
    bare = made(250).replace_schema_metadata(None)  # as it may come out of a transformation
    data = pack_parquet(bare)
    file = pq.ParquetFile(io.BytesIO(data))
    assert b"huggingface" in file.schema_arrow.metadata
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [100, 100, 50]
    assert groups[0].column(0).compression == "ZSTD"
    assert file.read().drop_columns("stars").equals(bare.drop_columns("stars"))  # which has NaN
    assert data == pack_parquet(made(250))


def test_webdataset_iterates_our_tars_with_picture_text_and_json(tmp_path: Path) -> None:
    import webdataset

    table = made(6)
    files = []
    for i in range(2):
        files.append(str(tmp_path / f"{i:06}.tar"))
        Path(files[-1]).write_bytes(pack_webdataset(table.slice(3 * i, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to the garbage collector
        found = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
        gc.collect()
    assert len(found) == 6
    for sample, row in zip(found, table.to_pylist(), strict=True):
        assert sample["__key__"] == row["id"]
        np.testing.assert_array_equal(np.asarray(sample["png"]), pixels_of(row))
        assert sample["txt"] == row["caption"]
        assert sample["json"].keys() == set(table.column_names) - {"image", "caption"}
        assert sample["json"]["seed"] == row["seed"]
        assert sample["json"]["day"] == row["day"].isoformat()
        assert sample["json"]["stars"] == (None if math.isnan(row["stars"]) else row["stars"])


def test_datasets_loads_our_tars_too(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack_webdataset(made(5)))
    found = load(tmp_path, "webdataset", data_files=str(tmp_path / "a.tar"))
    assert isinstance(found[4]["png"], Image.Image)
    assert found[4]["json"]["seed"] == 4


def test_a_text_that_comes_late_does_not_break_the_reading_of_tars(tmp_path: Path) -> None:
    table = pa.concat_tables([made(6, old_file_name=None), made(2, 6, negative="blurred")])
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(pack_webdataset(table.slice(4 * i, 4)))
    found = load(tmp_path, "webdataset", data_files=str(tmp_path / "*.tar"))
    assert [row["json"]["negative"] for row in found] == [""] * 6 + ["blurred"] * 2
    assert [row["json"]["old_file_name"] for row in found] == [""] * 6 + ["x.jpg"] * 2


def test_a_tar_is_the_same_bytes_each_time_and_says_nothing_of_who_made_it_and_when() -> None:
    data = pack_webdataset(made(3))
    assert data == pack_webdataset(made(3))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert [m.name.split(".")[1] for m in members] == ["png", "txt", "json"] * 3
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("name", ["../../etc/x", "a.b", "a/b", "", "ü", "x" * 200, "new\nline"])
def test_an_id_that_is_no_plain_name_gets_a_key_that_is(name: str) -> None:
    key = row_key(name)
    assert key == item_id(name.encode())
    with tarfile.open(fileobj=io.BytesIO(pack_webdataset(made(1, id=name)))) as tar:
        assert tar.getnames() == [f"{key}.png", f"{key}.txt", f"{key}.json"]
        inside = tar.extractfile(f"{key}.json")
        assert inside is not None
        assert json.load(inside)["id"] == name


def test_a_row_without_caption_has_an_empty_text() -> None:
    with tarfile.open(fileobj=io.BytesIO(pack_webdataset(made(1, caption=None)))) as tar:
        assert tar.getmembers()[1].size == 0


def test_two_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    table = pa.concat_tables([made(2), made(1)])
    with pytest.raises(ValueError, match="two rows"):
        pack_webdataset(table)
    with pytest.raises(ValueError, match="two rows"):
        write_imagefolder([table], tmp_path / "data", rows=3)
    assert not (tmp_path / "data" / "metadata.jsonl").exists()


def test_datasets_loads_our_imagefolder(tmp_path: Path) -> None:
    table = made(5)
    write_imagefolder([table.slice(0, 3), table.slice(3)], tmp_path / "data", rows=5)
    found = {row["id"]: row for row in load(tmp_path, "imagefolder", data_dir=str(tmp_path / "data"))}
    assert len(found) == 5
    for row in table.to_pylist():
        same = found[row["id"]]
        np.testing.assert_array_equal(np.asarray(same["image"]), pixels_of(row))
        assert (same["caption"], same["seed"]) == (row["caption"], row["seed"])
        assert same["old_filename"] == "x.jpg"  # under its own name it would be taken for a picture


def test_our_own_jobs_read_our_imagefolder(tmp_path: Path) -> None:
    write_imagefolder([made(4)], tmp_path / "data", rows=4)
    source = open_source(str(tmp_path / "data"))
    listing = pa.concat_tables(source.listing()).to_pylist()
    assert [row["reason"] for row in listing] == [None] * 4
    assert {row["caption"] for row in listing} == set(made(4)["caption"].to_pylist())
    data = next(open_reader(source.describe()).read([listing[0]["locator"]]))
    assert isinstance(data, bytes)


def test_a_value_that_comes_late_does_not_break_the_reading_of_a_large_imagefolder(tmp_path: Path) -> None:
    long = "long " * 4_000  # 10 MB of metadata, from which datasets takes the types, are soon full
    early = made(600, caption=long, negative=None, words=[])
    late = made(3, start=600, caption=long, negative="blurred", words=["late"])
    write_imagefolder([early, late], tmp_path / "data", rows=603)
    assert (tmp_path / "data" / "metadata.jsonl").stat().st_size > 11e6
    found = load(tmp_path, "imagefolder", data_dir=str(tmp_path / "data")).remove_columns("image")
    negative = dict(zip(found["id"], found["negative"], strict=True))
    assert negative == dict(zip(early["id"].to_pylist(), [None] * 600, strict=True)) | dict(
        zip(late["id"].to_pylist(), ["blurred"] * 3, strict=True)
    )


def test_many_pictures_lie_in_sub_folders_by_their_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "FLAT_FOLDER", 4)
    write_imagefolder([made(4)], tmp_path / "few", rows=4)
    write_imagefolder([made(5)], tmp_path / "many", rows=5)
    for row_id in made(4)["id"].to_pylist():
        assert (tmp_path / "few" / "images" / f"{row_id}.png").is_file()
        assert (tmp_path / "many" / "images" / row_id[:2] / f"{row_id}.png").is_file()
    assert len(load(tmp_path, "imagefolder", data_dir=str(tmp_path / "many"))) == 5


def test_a_killed_imagefolder_is_run_again_and_comes_out_the_same(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def killed() -> Iterator[pa.Table]:
        yield made(3)
        raise KilledError

    folder = tmp_path / "data"
    with pytest.raises(KilledError):
        write_imagefolder(killed(), folder, rows=5)
    assert not (folder / "metadata.jsonl").exists()
    whole = folder / "images" / f"{made(1)['id'][0]}.png"
    (folder / ".aside-left").write_bytes(b"half of the metadata")
    before = whole.stat().st_mtime_ns
    (folder / "images" / f"{made(2)['id'][1]}.png").write_bytes(b"damaged")
    for _ in range(2):
        write_imagefolder([made(3), made(2, start=3)], folder, rows=5)
        assert whole.stat().st_mtime_ns == before  # not written again
    write_imagefolder([made(5)], tmp_path / "fresh", rows=5)

    def content(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert content(folder) == content(tmp_path / "fresh")


def test_an_imagefolder_with_another_number_of_rows_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 rows in the tables, 5 announced"):
        write_imagefolder([made(4)], tmp_path, rows=5)
    assert not (tmp_path / "metadata.jsonl").exists()
