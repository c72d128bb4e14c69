"""Embeddings go out in clip-retrieval's layout and come in from it, whole and in their rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import index as index_job
from llmvis import clip_retrieval, indexing
from llmvis.clip_retrieval import ClipFolder, export
from llmvis.config import IndexConfig
from llmvis.index import open_index
from llmvis.ledger import parquet_bytes
from llmvis.schema import UserError, encoded
from llmvis.search import pictures, search
from llmvis.sources import SourceError
from llmvis.storage import LocalStore, StorageError, sha256_bytes
from tests.tiny import INFO

DIM = INFO.dim


def unit(rows: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def finished_encode(folder: Path, sizes: tuple[int, ...]) -> np.ndarray:
    """What `jobs.encode` leaves, as far as its manifest is read; returns the vectors `(N, D)` float16."""
    store, files, vectors, row = LocalStore(folder), [], unit(sum(sizes)).astype(np.float16), 0
    schema = encoded(DIM, [pa.field("stars", pa.int64()), pa.field("image_path", pa.string())])
    for number, size in enumerate(sizes):
        rows = range(row, row + size)
        flat = pa.array(vectors[row : row + size].reshape(-1))
        columns: dict[str, Any] = {
            "id": [f"id{i}" for i in rows], "path": [f"{i}.png" for i in rows],
            "locator": [b"%d.png" % i for i in rows],
            "caption": [f"caption {i}" if i else None for i in rows], "caption_truncated": [False] * size,
            "width": [8 + i for i in rows], "height": [8] * size,
            "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM),
            "stars": list(rows), "image_path": ["own"] * size,
        }  # fmt: skip
        data = parquet_bytes(pa.table(columns, schema=schema))
        store.write(name := f"data/{number}.parquet", data)
        files.append({"name": name, "rows": size, "bytes": len(data), "sha256": sha256_bytes(data)})
        row += size
    model = {"name": "tiny", "fingerprint": INFO.fingerprint, "dim": DIM, "licence": "none"}
    source = {"kind": "folder", "root": "/pictures", "shown_root": "/pictures"}
    store.write_json(
        "manifest.json",
        {"format": 1, "job": "encode", "rows": row, "model": model, "files": files, "source": source},
    )
    return vectors


def clip_folder(folder: Path, *parts: np.ndarray, **columns: Any) -> Path:
    """Vectors as clip-retrieval writes them."""
    for number, part in enumerate(parts):
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", part)
        paths = [f"{number}/{i}.jpg" for i in range(len(part))]
        made = {"image_path": paths, "caption": [f"of {path}" for path in paths]}
        extra = {name: values[: len(part)] for name, values in columns.items()}
        pq.write_table(pa.table({**made, **extra}), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def indexed(tmp_path: Path, folder: Path, **options: Any) -> dict[str, Any]:
    config = IndexConfig(embeddings=str(folder), out=str(tmp_path / "idx"), model="tiny", **options)
    return index_job.run(config)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "describe_encoder", lambda name: INFO)


def test_what_goes_out_follows_the_rules_of_embedding_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_retrieval, "PART_ROWS", 10)
    vectors = finished_encode(tmp_path / "enc", (6, 4, 3, *[9] * 10))
    done = export(str(tmp_path / "enc"), str(tmp_path / "clip"))
    assert done == {"rows": 103, "parts": 12, "dim": DIM}
    arrays = sorted((tmp_path / "clip" / "img_emb").iterdir())
    tables = sorted((tmp_path / "clip" / "metadata").iterdir())
    assert [p.name for p in arrays] == [f"img_emb_{k:02}.npy" for k in range(12)]
    assert [p.name for p in tables] == [f"metadata_{k:02}.parquet" for k in range(12)]
    found = []
    for array, table in zip(arrays, tables, strict=True):  # as its numpy_reader takes a header apart
        head = str(array.read_bytes()[:300].split(b"\n")[0])
        shape = re.search(r"'shape': \(([0-9]+), ([0-9]+)\)", head)
        assert shape is not None and re.search(r"'descr': '<f2'", head) and "'fortran_order': False" in head
        rows, dim = int(shape[1]), int(shape[2])
        offset = len(array.read_bytes().split(b"\n")[0]) + 1
        found.append(np.frombuffer(array.read_bytes()[offset:], "<f2").reshape(rows, dim))
        assert pq.read_metadata(table).num_rows == rows > 0
    np.testing.assert_array_equal(np.concatenate(found), vectors)
    rows_ = pa.concat_tables([pq.read_table(t) for t in tables]).to_pylist()
    assert [r["image_path"] for r in rows_] == [f"/pictures/{i}.png" for i in range(103)]
    assert rows_[5] == {
        "image_path": "/pictures/5.png", "caption": "caption 5", "id": "id5", "width": 13, "height": 8, "stars": 5,
        "source_image_path": "own",
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "enc"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    finished_encode(tmp_path / "enc", (4, 4))
    (tmp_path / "enc" / "data" / "1.parquet").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="damaged"):
        export(str(tmp_path / "enc"), str(tmp_path / "clip"))
    assert [p.name for p in tmp_path.iterdir()] == ["enc"]
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine").touch()
    with pytest.raises(StorageError, match="is there already"):
        export(str(tmp_path / "enc"), str(tmp_path / "clip"))


@pytest.mark.usefixtures("tiny_model")
def test_what_went_out_comes_in_again(tmp_path: Path) -> None:
    vectors = finished_encode(tmp_path / "enc", (5, 7))
    export(str(tmp_path / "enc"), str(tmp_path / "clip"))
    report = indexed(tmp_path, tmp_path / "clip")
    assert report["ledger"] == {
        "input": 12, "indexed": 12, "known": 0, "not_finite": 0, "zero": 0, "made_unit_length": 0
    }  # fmt: skip
    with open_index(str(tmp_path / "idx"), INFO.fingerprint) as index:
        (hits,) = search(index, vectors[7:8].astype(np.float32), 1)
        assert (hits[0].path, hits[0].caption, hits[0].width) == ("/pictures/7.png", "caption 7", 15)
        assert hits[0].columns["stars"] == 7


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
def test_vectors_are_made_unit_length_and_those_that_cannot_be_are_counted(tmp_path: Path, kind: str) -> None:
    first, second = unit(6).astype(kind), unit(4, seed=1).astype(kind) * 3
    first[1, 0], first[2, 0], first[3] = np.nan, np.inf, 0
    report = indexed(tmp_path, clip_folder(tmp_path / "clip", first, second))
    assert report["ledger"] == {
        "input": 10, "indexed": 7, "known": 0, "not_finite": 2, "zero": 1, "made_unit_length": 4
    }  # fmt: skip
    with open_index(str(tmp_path / "idx"), INFO.fingerprint) as index:
        scores, rows = index.search(unit(4, seed=1), 1)
        np.testing.assert_allclose(scores[:, 0], 1, atol=2e-3)
        assert [m["path"] for m in index.metadata(rows[:, 0])] == [f"1/{i}.jpg" for i in range(4)]


@pytest.mark.usefixtures("tiny_model")
def test_pictures_are_found_below_image_root_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "pics" / "0").mkdir(parents=True)
    (tmp_path / "pics" / "0" / "0.jpg").write_bytes(b"the picture")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = clip_folder(tmp_path / "clip", unit(2))
    paths = pa.array(["0/0.jpg", "../secret.jpg"])
    pq.write_table(pa.table({"image_path": paths}), folder / "metadata" / "metadata_0.parquet")
    indexed(tmp_path, folder, image_root=str(tmp_path / "pics"))
    with open_index(str(tmp_path / "idx"), INFO.fingerprint) as index:
        (hits,) = search(index, unit(2)[:1], 2)
        assert pictures(index, hits) == [b"the picture", None]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: np.save(f / "img_emb" / "img_emb_1.npy", unit(3)[:, :5]),
            "has 5 dimensions, the model has",
        ),
        (lambda f: np.save(f / "img_emb" / "img_emb_1.npy", unit(9)), "9 rows and .*metadata_1.parquet 3"),
        (lambda f: np.save(f / "img_emb" / "img_emb_1.npy", np.array([{}])), "holds object"),
        (lambda f: (f / "img_emb" / "img_emb_1.npy").write_bytes(b"x" * 99), r"no \.npy file"),
        (lambda f: (f / "metadata" / "metadata_1.parquet").unlink(), "metadata_1.parquet is not there"),
    ],
)
def test_halves_that_do_not_fit_are_refused_before_the_work(tmp_path: Path, damage: Any, words: str) -> None:
    folder = clip_folder(tmp_path / "clip", unit(3), unit(3))
    damage(folder)
    with pytest.raises(SourceError, match=words):
        ClipFolder(str(folder), dim=DIM)


def test_a_cut_off_array_stops_the_build(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip", unit(3))
    path = folder / "img_emb" / "img_emb_0.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SourceError, match="cut off"):
        list(ClipFolder(str(folder), dim=DIM).read(0, 0, 3))


def test_the_model_must_be_named_for_a_foreign_folder_and_only_for_one(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip", unit(3))
    with pytest.raises(UserError, match="name the model with --model"):
        index_job.run(IndexConfig(embeddings=str(tmp_path / "clip"), out=str(tmp_path / "idx")))
    finished_encode(tmp_path / "enc", (3,))
    with pytest.raises(UserError, match="knows its own"):
        index_job.run(IndexConfig(embeddings=str(tmp_path / "enc"), out=str(tmp_path / "idx"), model="tiny"))
