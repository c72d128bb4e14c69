"""Many queries at once find what each finds alone; every bad query has its reason; copies are gathered in groups."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_search
from PIL import Image
from tiny_search import DIM, index_of, run, vectors_of

from jobs.search import queries_of
from llmvis.batch_search import IndexMovedError, LoadSearch, Version
from llmvis.cluster.tally import JobError
from llmvis.config_bulk import BatchSearchConfig
from llmvis.index import IndexMismatchError, open_index, plan_kind, read_info
from llmvis.ledger import read_data, read_manifest
from llmvis.mining import duplicates, linked, write_duplicates
from llmvis.plan import PlanError
from llmvis.retry import release
from llmvis.schema import UserError
from llmvis.sources.base import SourceError
from llmvis.storage import LocalStore

WORDS = ("red", "green", "blue", "white", "black")


def results(out: Path) -> list[dict[str, Any]]:
    store = LocalStore(out)
    return [row for f in read_manifest(store, "search")["files"] for row in read_data(store, f).to_pylist()]


def dead(out: Path) -> dict[str, tuple[str, str]]:
    store = LocalStore(out)
    rows = [row for f in read_manifest(store, "search")["dead"] for row in read_data(store, f).to_pylist()]
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 vectors in an exact index."""
    folder = tmp_path_factory.mktemp("index")
    index_of(folder, vectors_of(300))
    return folder


def config(idx: Path, out: Path, **more: Any) -> BatchSearchConfig:
    return BatchSearchConfig(index=str(idx), out=str(out), **{"shard_items": 8, **more})


def one_by_one(idx: Path, queries: np.ndarray, k: int, **how: Any) -> Iterator[list[tuple[str, float]]]:
    with open_index(str(idx)) as index:
        for query in queries:
            scores, rows = index.search(query[None].astype(np.float32), k, **how)
            yield [(m["id"], s) for m, s in zip(index.metadata(rows[0]), scores[0], strict=True)]


def same(hits: list[dict[str, Any]], truth: list[tuple[str, float]]) -> None:
    assert [hit["id"] for hit in hits] == [row_id for row_id, _ in truth]
    np.testing.assert_allclose([hit["score"] for hit in hits], [score for _, score in truth], atol=1e-5)
    assert [hit["rank"] for hit in hits] == list(range(1, len(hits) + 1))


def test_texts_find_what_each_finds_alone_and_bring_their_columns(
    idx: Path, tmp_path: Path, ray_cluster: None
) -> None:
    texts = [f"{WORDS[i % 5]} {WORDS[i % 4]}" for i in range(20)]
    rows = [{"text": text, "who": f"user {i}", "id": i} for i, text in enumerate(texts)]
    rows[3]["text"], rows[9]["text"] = "", None  # type: ignore[assignment]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(config(idx, tmp_path / "out", queries=str(tmp_path / "q.jsonl"), k=7))
    ledger = report["ledger"]
    assert (ledger["written"], ledger["dead_lettered"], ledger["duplicates"]) == (18, 2, 0)
    assert {place: reason for place, (reason, _) in dead(tmp_path / "out").items()} == {
        "q.jsonl#3": "empty", "q.jsonl#9": "empty",
    }  # fmt: skip
    found = results(tmp_path / "out")
    assert [row["who"] for row in found] == [f"user {i}" for i in range(20) if i not in (3, 9)]
    assert [row["source_id"] for row in found] == [i for i in range(20) if i not in (3, 9)]
    queries = tiny.TinyEncoder().encode_texts([row["text"] for row in found])
    for row, truth in zip(found, one_by_one(idx, queries, 7), strict=True):
        same(row["hits"], truth)
    hit = found[0]["hits"][0]
    number = hit["path"].removeprefix("shown/").removesuffix(".png")
    assert hit["caption"] == f"picture {number}" and hit["id"] == tiny_search.item_id(number.encode())


def test_vectors_of_any_length_are_queries_and_bad_ones_are_told(
    idx: Path, tmp_path: Path, ray_cluster: None
) -> None:
    rng = np.random.default_rng(5)
    vectors = [list(row) for row in rng.standard_normal((12, DIM)) * 9]
    vectors[2], vectors[4], vectors[6] = [1.0] * (DIM + 1), [float("nan")] * DIM, [0.0] * DIM
    cells = pa.array([*vectors[:8], None, *vectors[8:]], pa.list_(pa.float64()))
    table = pa.table({"v": cells, "text": [f"t{i}" for i in range(13)], "width": list(range(13))})
    (tmp_path / "q").mkdir()
    pq.write_table(table.slice(0, 7), tmp_path / "q" / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(7), tmp_path / "q" / "b.parquet")
    asked = config(idx, tmp_path / "out", queries=str(tmp_path / "q"), vector_column="v", k=4, min_score=0.1)
    run(asked)
    letters = dead(tmp_path / "out")
    assert {place: reason for place, (reason, _) in letters.items()} == {
        "a.parquet#2": "bad_vector", "a.parquet#4": "bad_vector", "a.parquet#6": "bad_vector",
        "b.parquet#1": "empty",
    }  # fmt: skip
    assert "49 dimensions, the index has 48" in letters["a.parquet#2"][1]
    found = results(tmp_path / "out")
    good = [i for i in range(13) if i not in (2, 4, 6, 8)]
    assert [row["width"] for row in found] == good
    assert [(row["text"], row["source_text"]) for row in found] == [(None, f"t{i}") for i in good]
    queries = tiny.unit(np.array([cells[i].as_py() for i in good]))
    truth = [[h for h in hits if h[1] >= 0.1] for hits in one_by_one(idx, queries, 4)]
    for row, hits in zip(found, truth, strict=True):
        same(row["hits"], hits)


def test_pictures_that_an_encode_job_wrote_are_queries(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 5)
    (tmp_path / "images" / "00002.txt").write_text("two")
    tiny.run(str(tmp_path / "images"), str(tmp_path / "enc"))
    index_of(tmp_path / "idx", vectors_of(50))
    run(
        config(tmp_path / "idx", tmp_path / "out", queries=str(tmp_path / "enc"), k=3, where="tag == 'tag 1'")
    )
    store = LocalStore(tmp_path / "enc")
    (file,) = read_manifest(store, "encode")["files"]
    pictures = read_data(store, file)
    found = results(tmp_path / "out")
    assert [row["id"] for row in found] == pictures["id"].to_pylist()
    assert (found[2]["caption"], found[2]["text"]) == ("two", None)
    assert found[2]["path"] == str(tmp_path / "images" / "00002.png") and found[2]["width"] == 8
    queries = tiny.unit(np.array(pictures["embedding"].to_pylist(), np.float32))
    for row, truth in zip(
        found, one_by_one(tmp_path / "idx", queries, 3, where="tag == 'tag 1'"), strict=True
    ):
        same(row["hits"], truth)


@pytest.mark.parametrize("other", [False, True], ids=["its own", "another index"])
def test_neighbours_of_an_indexs_pictures_leave_each_itself_out(
    idx: Path, tmp_path: Path, ray_cluster: None, other: bool
) -> None:
    asked = idx
    if other:
        asked = tmp_path / "other"
        index_of(asked, vectors_of(40, seed=1))  # other vectors under some of the same ids
    run(config(idx, tmp_path / "out", queries=str(asked) if other else None, k=5, shard_items=100))
    found = results(tmp_path / "out")
    assert len(found) == (40 if other else 300)
    assert found[1]["tag"] == "tag 1" and found[1]["path"] == "shown/1.png"
    queries = tiny.unit((vectors_of(40, seed=1) if other else vectors_of(300)).astype(np.float32))
    for row, truth in zip(found, one_by_one(idx, queries, 6), strict=True):
        same(row["hits"], [hit for hit in truth if hit[0] != row["id"]][:5])


def test_compressed_lists_answer_as_one_search_does(tmp_path: Path, ray_cluster: None) -> None:
    vectors = vectors_of(3_000)
    index_of(tmp_path / "idx", vectors, plan=plan_kind("ivf_sq8", 3_000, DIM, 0.9))
    pq.write_table(
        pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors[:30].reshape(-1)), DIM)}),
        tmp_path / "q.parquet",
    )
    run(config(tmp_path / "idx", tmp_path / "out", queries=str(tmp_path / "q.parquet"), k=5))
    for row, truth in zip(
        results(tmp_path / "out"), one_by_one(tmp_path / "idx", vectors[:30], 5), strict=True
    ):
        assert [hit["id"] for hit in row["hits"]] == [row_id for row_id, _ in truth]


def test_a_killed_driver_goes_on_and_every_query_is_there_once(idx: Path, tmp_path: Path) -> None:
    queries, out = tmp_path / "q.txt", tmp_path / "out"
    queries.write_text("".join(f"{WORDS[i % 5]} number {i}\n" for i in range(160)))
    command = [sys.executable, tiny_search.__file__, str(idx), str(queries), str(out)]
    with (tmp_path / "log").open("w") as log:
        slow = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "TINY_DELAY": "0.2"}, start_new_session=True
        )
    until = time.monotonic() + 90
    while len(LocalStore(out).names("_commits")) < 3:
        assert slow.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.01)
    slow.send_signal(signal.SIGKILL)
    slow.communicate()
    assert not (out / "manifest.json").exists(), "the kill came too late to prove anything"
    again = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert again.returncode == 0, again.stderr
    report = json.loads([line for line in again.stdout.splitlines() if line.startswith("{")][-1])
    assert report["shards_resumed"] >= 3
    found = results(out)
    assert [row["text"] for row in found] == queries.read_text().splitlines()
    assert len({row["id"] for row in found}) == 160


def test_an_index_that_moved_is_not_mixed_with_the_one_that_was_planned(
    tmp_path: Path, ray_cluster: None
) -> None:
    index_of(tmp_path / "idx", vectors_of(20))
    (tmp_path / "q.txt").write_text("red\nblue\n")
    asked = config(tmp_path / "idx", tmp_path / "out", queries=str(tmp_path / "q.txt"))
    planned = Version.of(asked.index, read_info(asked.index))
    run(asked)
    index_of(tmp_path / "idx", vectors_of(21))
    with pytest.raises(PlanError, match=r"index is \"version 2.*was \"version 1.*new --out"):
        run(asked)
    load = LoadSearch(load=tiny.load, index=planned, asked=None, k=1)
    with pytest.raises(IndexMovedError, match=r"was at version 1 .* is at version 2 now.*new --out"):
        load()


def test_an_index_that_moves_while_the_job_starts_ends_it_with_words(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of(tmp_path / "idx", vectors_of(20))
    (tmp_path / "q.txt").write_text("red\nblue\n")
    before = read_info(str(tmp_path / "idx"))
    index_of(tmp_path / "idx", vectors_of(21))
    monkeypatch.setattr(tiny_search, "read_info", lambda path: before)  # as the driver planned
    with pytest.raises(JobError, match=r"is at version 2 now"):
        run(config(tmp_path / "idx", tmp_path / "out", queries=str(tmp_path / "q.txt")))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_mended_query_comes_in_by_a_retry(idx: Path, tmp_path: Path, ray_cluster: None) -> None:
    file, out = tmp_path / "q.csv", tmp_path / "out"
    file.write_text('text,who\nred,a\n"",b\nblue,c\n')
    run(config(idx, out, queries=str(file)))
    assert list(dead(out)) == ["q.csv#1"]
    file.write_text("text,who\nred,a\ngreen,b\nblue,c\n")
    with LocalStore(out).lock():
        release(LocalStore(out), ["empty"])
    run(config(idx, out, queries=str(file)))
    assert [(row["text"], row["who"]) for row in results(out)] == [
        ("red", "a"),
        ("green", "b"),
        ("blue", "c"),
    ]
    assert dead(out) == {}


def test_queries_that_do_not_fit_the_index_are_refused_before_any_work(idx: Path, tmp_path: Path) -> None:
    def refused(name: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), tmp_path / name)
        queries_of(config(idx, tmp_path / "out", queries=str(tmp_path / name)), read_info(str(idx)))

    with pytest.raises(IndexMismatchError, match="3 dimensions"):
        refused("a.parquet", embedding=pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3)))
    with pytest.raises(SourceError, match="--vector-column"):
        refused("b.parquet", numbers=[1, 2])
    with pytest.raises(SourceError, match="lists of floats"):
        refused("c.parquet", embedding=[["a"]])
    with pytest.raises(UserError, match="leave --where out"):
        config(idx, tmp_path / "out", near_duplicates=0.9, where="width > 3")


def planted(groups: int, rows: int) -> tuple[np.ndarray, list[set[int]]]:
    """Vectors of which some are near copies of another, in any order, and the groups by brute force at .95."""
    rng = np.random.default_rng(7)
    base = tiny.unit(rng.standard_normal((rows, DIM)))
    copies = [tiny.unit(base[[g]] + 0.02 * rng.standard_normal((1 + g % 4, DIM))) for g in range(groups)]
    vectors = np.concatenate([base, *copies])[rng.permutation(rows + sum(map(len, copies)))].astype(
        np.float16
    )
    unit = tiny.unit(vectors.astype(np.float32))
    near = unit @ unit.T >= 0.95
    left, found = set(range(len(unit))), []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            one = todo.pop()
            if one not in group:
                group.add(one)
                todo += np.flatnonzero(near[one]).tolist()
        left -= group
        found.append(group)
    return vectors, [group for group in found if len(group) > 1]


def test_planted_copies_are_gathered_as_brute_force_does(tmp_path: Path, ray_cluster: None) -> None:
    vectors, truth = planted(30, 100)
    ids = index_of(tmp_path / "idx", vectors)
    (tmp_path / "idx" / "images").mkdir()
    for i in range(len(vectors)):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "idx" / "images" / f"{i}.png")
    run(config(tmp_path / "idx", tmp_path / "out", near_duplicates=0.95, shard_items=64))
    store = LocalStore(tmp_path / "out")
    said = write_duplicates(store, str(tmp_path / "idx"))
    rows = pq.read_table(tmp_path / "out" / "duplicates.parquet").to_pylist()
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    place = {row_id: i for i, row_id in enumerate(ids)}
    assert [{place[row["id"]] for row in group} for group in groups.values()] == truth
    assert len(truth) == 30 and said == {
        "groups": 30, "pictures": len(rows), "redundant": len(rows) - 30,
    }  # fmt: skip
    unit = tiny.unit(vectors.astype(np.float32))
    for group in groups.values():
        order = [place[row["id"]] for row in group]
        assert order == sorted(order)
        assert [row["kept"] for row in group] == [True] + [False] * (len(group) - 1)
        for row, i in zip(group, order, strict=True):
            assert row["path"] == f"shown/{i}.png"
            assert row["cosine"] is None or row["cosine"] == pytest.approx(unit[order[0]] @ unit[i], abs=2e-3)
    redundant = (tmp_path / "out" / "redundant.txt").read_text().split()
    assert redundant == [row["id"] for row in rows if not row["kept"]]
    with Image.open(tmp_path / "out" / "duplicates.png") as image:
        assert image.height > 12 * 100


def test_more_copies_than_hits_are_linked_through_each_other(tmp_path: Path, ray_cluster: None) -> None:
    base = vectors_of(1)
    noise = np.random.default_rng(3).standard_normal((30, DIM)) * 0.01
    index_of(tmp_path / "idx", tiny.unit(base.astype(np.float32) + noise).astype(np.float16))
    run(config(tmp_path / "idx", tmp_path / "out", near_duplicates=0.95, k=5))
    table = duplicates(LocalStore(tmp_path / "out"))
    assert table["group"].to_pylist() == [0] * 30
    assert table["cosine"].null_count > 0 and sum(table["kept"].to_pylist()) == 1


def test_chains_are_one_group_and_what_stands_alone_none() -> None:
    pairs = np.array([[4, 2, 7], [2, 0, 6]])
    assert linked(pairs, 8).tolist() == [0, 1, 0, 3, 0, 5, 6, 6]
