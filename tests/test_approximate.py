"""Compressed kinds: sharded as in one go, recall that holds on other queries, conditions, kills, damage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmvis.cleanup import clean
from llmvis.index import Index, IndexInfo, IndexMismatchError, build, open_index, plan_kind
from llmvis.index.ann import ListShards, train, write_lists
from llmvis.index.parts import InMemory
from llmvis.index.tune import query_cost, tune
from llmvis.inspection import inspect_folder
from llmvis.search import search
from llmvis.storage import LocalStore, StorageError

DIM, ROWS = 48, 6000
MODEL = {"name": "tiny", "fingerprint": "f" * 64, "dim": DIM, "licence": "none"}
KINDS = ("ivf_sq8", "ivf_rabitq")


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def collection(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in clusters, all moved one way: `float32 (rows, D)`, and that way. Texts lie away from them."""
    rng = np.random.default_rng(0)
    way = unit(rng.standard_normal((1, DIM)))
    centres = rng.standard_normal((60, DIM))
    pictures = centres[rng.integers(0, 60, rows)] + rng.standard_normal((rows, DIM))
    return unit(unit(pictures) + 0.4 * way), way


PICTURES, WAY = collection()


def texts(rows: np.ndarray, seed: int) -> np.ndarray:
    """What one would say of these pictures: near them, and away the other way, with noise."""
    noise = np.random.default_rng(seed).standard_normal((len(rows), DIM)) / DIM**0.5
    return unit(PICTURES[rows] - 0.9 * WAY + 0.5 * noise)


def encode_texts(captions: Sequence[str]) -> np.ndarray:
    return texts(np.array([int(caption) for caption in captions]), seed=1)


def table(first: int, stop: int) -> pa.Table:
    flat = pa.array(PICTURES[first:stop].astype(np.float16).reshape(-1))
    rows = np.arange(first, stop)
    return pa.table(
        {
            "id": [f"id{row}" for row in rows],
            "caption": [str(row) for row in rows],
            "half": pa.array(rows % 2 == 0),
            "mille": pa.array(rows % 1000),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM),
        }
    )


def make(path: Path, kind: str, stop: int = ROWS, *, shard_rows: int = 2500, **more: Any) -> dict[str, Any]:
    plan = replace(plan_kind(kind, stop, DIM, 0.95), shard_rows=shard_rows)  # type: ignore[arg-type]
    store = LocalStore(path)
    with store.lock():
        info = IndexInfo(model=MODEL, source={})
        part = InMemory(table=table(0, stop), source={}, key=f"the first {stop}")
        return build(store, info, [part], plan=plan, encode_texts=encode_texts, **more)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "idx"
    make(path, request.param)
    return path


def found(got: np.ndarray, true: np.ndarray) -> float:
    return float((got[:, :, None] == true[:, None, :]).any(2).mean())


def brute_force(queries: np.ndarray, k: int, rows: np.ndarray) -> np.ndarray:
    scores = queries @ PICTURES[rows].astype(np.float16).astype(np.float32).T
    return np.asarray(rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]])


def lists_of(folder: Path, blob: bytes, edges: list[int]) -> ListShards:
    paths = []
    for first, stop in pairwise(edges):
        paths.append(folder / f"{first}-{stop}.lists")
        write_lists(blob, [(first, PICTURES[first:stop])], paths[-1])
    return ListShards(blob, paths, np.diff(edges).tolist(), DIM)


@pytest.mark.parametrize("factory", ["IVF64,SQ8", f"RR{DIM},IVF64,RaBitQ", "IVF64_HNSW32,SQ8"])
def test_shards_answer_as_one_index_made_in_one_go(tmp_path: Path, factory: str) -> None:
    blob = train(PICTURES[:4000], factory)
    assert blob == train(PICTURES[:4000], factory), "training is the same for one seed"
    whole = lists_of(tmp_path, blob, [0, ROWS])
    parts = lists_of(tmp_path, blob, [0, 1, 2000, 3333, ROWS])
    for probes in (1, 7, 64):
        scores, rows = whole.search(texts(np.arange(300), 2), 30, probes)
        some_scores, some_rows = parts.search(texts(np.arange(300), 2), 30, probes)
        np.testing.assert_allclose(
            scores, some_scores, atol=1e-6
        )  # a rotation rounds by the rows it is given
        assert (rows == some_rows).mean() > (0.999 if "RR" in factory else 0.999_999)


def test_merged_shards_are_byte_for_byte_the_index_made_in_one_go(tmp_path: Path) -> None:
    import faiss

    blob = train(PICTURES[:4000], "IVF64,SQ8")
    lists_of(tmp_path, blob, [0, ROWS])
    lists_of(tmp_path, blob, [0, 2000, ROWS])
    whole, first, second = (
        faiss.read_InvertedLists(faiss.FileIOReader(str(tmp_path / f"{name}.lists")))
        for name in (f"0-{ROWS}", "0-2000", f"2000-{ROWS}")
    )
    first.merge_from(second, 0)
    for number in range(64):
        size = whole.list_size(number)
        assert first.list_size(number) == size
        for part, width in (("get_ids", 1), ("get_codes", whole.code_size)):
            one, other = (faiss.rev_swig_ptr(getattr(x, part)(number), size * width) for x in (whole, first))
            assert one.tobytes() == other.tobytes()


def test_recall_holds_on_queries_that_it_was_not_tuned_on(made: Path) -> None:
    with open_index(str(made)) as index:
        tuned = index.manifest["tuned"]
        assert (tuned["queries"], tuned["queries_are"], tuned["target"]) == (512, "captions", 0.95)
        assert tuned["recall_at_10"] >= 0.95 and tuned["nprobe"] < 64, "met, and not by looking at everything"
        queries = texts(np.random.default_rng(5).permutation(ROWS)[:500], seed=6)
        true = brute_force(queries, 10, np.arange(ROWS))
        scores, rows = index.search(queries, 10)
        assert 0.95 <= found(rows, true) < 1
        np.testing.assert_array_equal(index.search(queries, 10, exact=True)[1], true)
        exact = (PICTURES[rows].astype(np.float16).astype(np.float32) * queries[:, None]).sum(2)
        np.testing.assert_allclose(scores, exact, atol=1e-6)
        assert (np.diff(scores, axis=1) <= 0).all()
        recalls = [point["recall"] for point in tuned["curve"]]
        assert recalls == sorted(recalls) and len(recalls) > 2


def test_pictures_ask_where_there_are_no_captions_and_say_so(tmp_path: Path) -> None:
    plan = plan_kind("ivf_sq8", 2000, DIM, 0.95)
    rows = table(0, 2000).drop_columns(["caption"])
    built = build(
        LocalStore(tmp_path), IndexInfo(model=MODEL, source={}), [rows], plan=plan, encode_texts=encode_texts
    )
    assert built["tuned"]["queries_are"] == "pictures, a proxy"


def test_the_cheapest_setting_that_meets_the_target_is_taken_or_the_best(tmp_path: Path) -> None:
    from llmvis.index.exact import Shard

    lists = lists_of(tmp_path, train(PICTURES, "IVF64,SQ8"), [0, ROWS])
    shards = [Shard(0, PICTURES.astype(np.float16))]
    queries = texts(np.arange(200), 3)
    easy, hard, never = (
        tune(lists, shards, queries, target=target, rows=ROWS, own=None) for target in (0.5, 0.95, 1.1)
    )
    assert easy["share_of_exact"] < hard["share_of_exact"]
    assert easy["recall_at_10"] >= 0.5 and hard["recall_at_10"] >= 0.95
    assert never["recall_at_10"] == max(point["recall"] for point in never["curve"])
    assert query_cost(1000, 10, 92, 48, 2, 5) == 200 * 100 + 5 * (96 + 8192)


def test_conditions_find_what_brute_force_finds(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = texts(np.arange(100, 140), 4), np.arange(ROWS)
    cases: list[tuple[str, np.ndarray]] = [
        ("mille < 0", rows[:0]),
        ("id == 'id77'", rows[77:78]),
        ("mille == 7", rows[rows % 1000 == 7]),
        ("half", rows[::2]),
        ("caption is not None", rows),
    ]
    with open_index(str(made)) as index:
        for where, allowed in cases:
            true = brute_force(queries, 10, allowed)
            np.testing.assert_array_equal(index.search(queries, 10, where=where, exact=True)[1], true)
        monkeypatch.setattr("llmvis.index.opened.FEW_ROWS", 0)  # by lists, as a large index does it
        for where, allowed in cases:
            true = brute_force(queries, 10, allowed)
            _, got = index.search(queries, 10, where=where)
            assert got.shape == true.shape, "k asked is k got, as far as there are as many"
            assert np.isin(got, allowed).all() and all(len(set(each)) == len(each) for each in got)
            assert got.size == 0 or found(got, true) >= 0.93


def test_more_than_the_probed_lists_hold_is_got_all_the_same(made: Path) -> None:
    with open_index(str(made)) as index:
        for k in (3000, ROWS + 5):
            _, rows = index.search(texts(np.arange(2), 5), k)
            assert rows.shape == (2, min(k, ROWS)) and len(set(rows[0])) == min(k, ROWS)


def test_added_rows_are_found_by_the_same_trained_index(tmp_path: Path) -> None:
    first = make(tmp_path, "ivf_sq8", 4000)
    info = IndexInfo(model=MODEL, source={"kind": "more"})
    added = build(LocalStore(tmp_path), info, [table(3900, ROWS)], add=True, encode_texts=encode_texts)
    assert added["trained"] == first["trained"] and added["factory"] == first["factory"]
    assert added["shards"][:2] == first["shards"] and (added["rows"], len(added["shards"])) == (ROWS, 3)
    with open_index(str(tmp_path)) as index:
        queries = texts(np.arange(4000, ROWS, 7), 6)
        assert found(index.search(queries, 10)[1], brute_force(queries, 10, np.arange(ROWS))) >= 0.93
    assert inspect_folder(str(tmp_path), check_hashes=True)["healthy"] and clean(str(tmp_path)) == []


def test_every_flipped_bit_is_refused(made: Path, tmp_path: Path) -> None:
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file() and p.name != ".lock")
    assert {file.suffix for file in files} == {"", ".json", ".npy", ".arrow", ".lists", ".trained"}
    dice = random.Random(3)
    bad = Path(shutil.copytree(made, tmp_path / "bad"))
    for trial in range(3 * len(files)):
        victim = bad / files[trial % len(files)]
        good = victim.read_bytes()
        data = bytearray(good)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        victim.write_bytes(bytes(data))
        with pytest.raises(StorageError):
            open_index(str(bad))
        victim.write_bytes(good)
    open_index(str(bad)).close()


def signed(path: Path, change: Callable[[dict[str, Any]], None]) -> Index:
    """Opens the index after a change that whoever can write it has made, with right hashes."""
    file = path / "manifests" / "000001.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    (path / "CURRENT").write_text(f"000001 {hashlib.sha256(file.read_bytes()).hexdigest()}\n")
    return open_index(str(path))


HARM: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "lists elsewhere": (lambda m: m["shards"][0]["lists"].update(name="../x.lists"), "said to lie in"),
    "no lists": (lambda m: m["shards"][0].pop("lists"), "lists has no hash"),
    "no trained index": (lambda m: m.pop("trained"), "trained to has no hash"),
    "trained elsewhere": (lambda m: m["trained"].update(name="/etc/passwd"), "said to lie in"),
    "no tuning": (lambda m: m.pop("tuned"), "how many lists"),
    "no lists probed": (lambda m: m["tuned"].update(nprobe=0), "how many lists"),
    "recall of 7": (lambda m: m["tuned"].update(recall_at_10=7), "no measured recall"),
    "no factory": (lambda m: m.pop("factory"), "compressed"),
    "lists of another shard": (lambda m: m["shards"][0].update(lists=m["shards"][2]["lists"]), "not those of"),
    "vectors for lists": (
        lambda m: m.update(trained={**m["trained"], "sha256": m["shards"][0]["lists"]["sha256"]}), "damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_changed_manifest_with_a_right_hash_is_refused(made: Path, tmp_path: Path, harm: str) -> None:
    change, words = HARM[harm]
    with pytest.raises(StorageError, match=words):
        signed(Path(shutil.copytree(made, tmp_path / "bad")), change)


KILLED = """
import os, signal, sys
from pathlib import Path
import test_approximate as t
from llmvis.storage import LocalStore
point, kind, real, puts, made = sys.argv[2], sys.argv[3], LocalStore.write, [], []
def create(self, name, real=LocalStore.create):
    made.append(name)
    return real(self, name)
def write(self, name, data):
    if point == name.rpartition("/")[2].rpartition(".")[2] or point == name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, data)
def put(self, name, path, real=LocalStore.put):
    puts.append(name)
    made.append(name)
    if point == f"file {len(puts)}":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, path)
LocalStore.write, LocalStore.put, LocalStore.create = write, put, create
t.make(Path(sys.argv[1]), kind)
print(*[name for name in made if name.startswith("shards/") and not name.endswith(".json")])
"""


def build_in_a_process(path: Path, point: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]),
    }
    command = [sys.executable, "-c", KILLED, str(path), point, "ivf_sq8"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("point", "made_again"), [("trained", 4), ("file 2", 2), ("CURRENT", 0)]
)  # before the trained index is there; after one shard's lists; after the manifest
def test_a_killed_build_leaves_the_old_version_and_is_gone_on_with(
    tmp_path: Path, point: str, made_again: int
) -> None:
    make(tmp_path, "flat", 100)
    killed = build_in_a_process(tmp_path, point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open_index(str(tmp_path)) as old:
        assert (old.rows, old.manifest["kind"]) == (100, "flat")
    done = build_in_a_process(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    if point != "CURRENT":  # then the next version has other names, and nothing to take over
        assert len(done.stdout.split("\n")[-2].split()) == made_again
    with open_index(str(tmp_path)) as new:
        assert (new.rows, new.manifest["kind"]) == (ROWS, "ivf_sq8")
        queries = texts(np.arange(0, ROWS, 31), 7)
        assert found(new.search(queries, 10)[1], brute_force(queries, 10, np.arange(ROWS))) >= 0.93
    assert not (tmp_path / "shards/building.json").exists()
    assert clean(str(tmp_path)) == [] and inspect_folder(str(tmp_path), check_hashes=True)["healthy"]


def test_a_finished_part_that_was_damaged_since_is_made_again(tmp_path: Path) -> None:
    assert build_in_a_process(tmp_path, "file 2").returncode == -signal.SIGKILL
    trained = tmp_path / "shards/000001.trained"
    data = bytearray(trained.read_bytes())
    data[-1] ^= 1
    trained.write_bytes(bytes(data))
    make(tmp_path, "ivf_sq8")
    open_index(str(tmp_path)).close()


def test_inspect_shows_the_measured_recall_and_sees_missing_lists(made: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(made, tmp_path / "bad"))
    (part,) = inspect_folder(str(bad), check_hashes=True)["parts"]
    assert part["tuned"]["recall_at_10"] >= 0.95 and part["problems"] == []
    assert [len(shard["files"]) for shard in part["shards"]] == [3, 3, 3]
    (bad / "shards/000001-00001.lists").unlink()
    (bad / "shards/000001.trained").write_bytes(b"")
    (part,) = inspect_folder(str(bad))["parts"]
    assert len(part["problems"]) == 2


def test_another_dimension_is_refused(made: Path) -> None:
    with open_index(str(made)) as index, pytest.raises(IndexMismatchError, match="48 dimensions"):
        index.search(np.zeros((1, 8), np.float32), 1)


def test_pages_follow_on_each_other_and_distinct_hits_are_unlike(tmp_path: Path) -> None:
    twice = np.repeat(PICTURES[:50], 2, axis=0)
    flat = pa.array(twice.astype(np.float16).reshape(-1))
    rows = pa.table({name: [str(i) for i in range(100)] for name in ("id", "path", "caption")})
    rows = rows.append_column("locator", pa.array([b""] * 100)).append_column("width", pa.array([8] * 100))
    rows = rows.append_column("height", pa.array([8] * 100)).append_column(
        "caption_truncated", pa.array([False] * 100)
    )
    rows = rows.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, DIM))
    build(LocalStore(tmp_path), IndexInfo(model=MODEL, source={"shown_root": "/"}), [rows])
    with open_index(str(tmp_path)) as index:
        query = texts(np.array([3]), 1)
        (whole,) = search(index, query, 30)
        (page,) = search(index, query, 10, offset=20)
        assert page == whole[20:] and page[0].rank == 21
        (unlike,) = search(index, query, 30, distinct=0.999)
        assert len(unlike) == 30 and len({int(hit.id) // 2 for hit in unlike}) == 30
        assert len(search(index, query, 90, distinct=0.999)[0]) == 50, "all that there are"
        (few,) = search(index, query, 5, distinct=0.999, where="id in ('6', '7', '8')")
        assert [hit.id for hit in few] in (["6", "8"], ["8", "6"], ["7", "8"])
