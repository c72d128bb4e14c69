"""A thousand additions, deletions and compactions, of changing kinds, against a plain dictionary; readers meanwhile."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmvis.index import Index, IndexInfo, build, compact, delete, open_index, plan_kind
from llmvis.inspection import inspect_folder
from llmvis.storage import LocalStore

DIM = 16
MODEL = {"name": "tiny", "fingerprint": "f" * 64, "dim": DIM, "licence": "none"}
OPERATIONS = 1000
KINDS = ("flat", "flat", "ivf_sq8", "ivf_rabitq")


class Model:
    """What the index should be: id → vector and tag, in the order of its rows."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.chance = np.random.default_rng(seed)
        self.rows: dict[str, tuple[np.ndarray, int]] = {}
        self.names = [f"id{i}" for i in range(400)]
        self.versions: dict[int, set[str]] = {}
        self.kind = "flat"

    def batch(self) -> pa.Table:
        """Some ids, known ones too, with new vectors."""
        ids = self.dice.sample(self.names, self.dice.randint(1, 40))
        vectors = self.chance.standard_normal((len(ids), DIM))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        tags = [self.dice.randrange(10) for _ in ids]
        for row_id, vector, tag in zip(ids, vectors, tags, strict=True):
            self.rows.setdefault(row_id, (vector, tag))
        flat = pa.array(vectors.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, DIM)
        return pa.table({"id": ids, "tag": pa.array(tags, pa.int64()), "embedding": column})

    def compare(self, index: Index) -> None:
        """Exact answers are the model's, also under a condition; an approximate search finds living rows alone."""
        assert index.rows == len(self.rows) and index.ids() == self.rows.keys()
        query = self.chance.standard_normal((2, DIM)).astype(np.float32)
        tag = self.dice.randrange(10)
        for where, chosen in (
            (None, list(self.rows)),
            (f"tag == {tag}", [name for name, (_, t) in self.rows.items() if t == tag]),
        ):
            vectors = np.array([self.rows[name][0] for name in chosen], np.float32).reshape(-1, DIM)
            true = query @ vectors.T
            k = min(10, len(chosen))
            scores, rows = index.search(query, 10, where=where, exact=True)
            assert scores.shape == rows.shape == (2, k)
            np.testing.assert_allclose(scores, -np.sort(-true, axis=1)[:, :k], atol=1e-5)
            for found, expected in zip(rows, true, strict=True):
                names = [row["id"] for row in index.metadata(found)]
                assert len(set(names)) == k
                got = [expected[chosen.index(name)] for name in names]
                np.testing.assert_allclose(got, -np.sort(-expected)[:k], atol=1e-5)
            _, some = index.search(query, 10, where=where)
            assert some.shape == (2, k)
            assert {row["id"] for row in index.metadata(some.reshape(-1))} <= set(chosen)


def change(store: LocalStore, model: Model) -> str:
    """One operation on both; its name."""
    what = model.dice.choices(["add", "ids", "where", "compact"], [5, 4, 1, 2])[0]
    if what == "add":
        build(store, IndexInfo(model=MODEL, source={}), [model.batch()], add=True)
    elif what == "ids":
        gone = model.dice.sample(model.names, model.dice.randint(1, 30))
        delete(store, ids=pa.array(gone))
        for name in gone:
            model.rows.pop(name, None)
    elif what == "where":
        tag = model.dice.randrange(10)
        delete(store, where=f"tag == {tag}")
        model.rows = {name: row for name, row in model.rows.items() if row[1] != tag}
    else:
        model.kind = model.dice.choice(KINDS) if len(model.rows) > 5 else "flat"
        plan = replace(plan_kind(model.kind, len(model.rows), DIM, 0.9), shard_rows=50)  # type: ignore[arg-type]
        compact(store, plan=plan, retrain=model.dice.random() < 0.5)
    return what


class Reader(threading.Thread):
    """Opens the index over and over; each time it must be one of the versions, whole."""

    def __init__(self, path: Path, versions: dict[int, set[str]]) -> None:
        super().__init__(daemon=True)
        self._path, self._versions = path, versions
        self.stop = threading.Event()
        self.seen: list[tuple[int, set[str]]] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                with open_index(str(self._path)) as index:
                    self.seen.append((index.manifest["version"], index.ids()))
                self.stop.wait(0.05)
        except BaseException as error:  # noqa: BLE001 - told by the test
            self.error = error


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: thousands of fsyncs are not what is tested here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def test_a_thousand_random_changes_give_the_answers_of_a_plain_model(folder: Path) -> None:
    model, store = Model(7), LocalStore(folder)
    with store.lock():
        build(store, IndexInfo(model=MODEL, source={}), [model.batch()])
        with open_index(str(folder)) as index:
            model.versions[index.manifest["version"]] = set(model.rows)
        reader = Reader(folder, model.versions)
        reader.start()
        done: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for _ in range(OPERATIONS):
            what = change(store, model)
            with open_index(str(folder)) as index:
                model.compare(index)
                model.versions[index.manifest["version"]] = set(model.rows)
                kinds[index.manifest["kind"]] = kinds.get(index.manifest["kind"], 0) + 1
            done[what] = done.get(what, 0) + 1
        reader.stop.set()
        reader.join()
    assert reader.error is None and len(reader.seen) > 50
    assert all(ids == model.versions[version] for version, ids in reader.seen)
    assert sum(done.values()) == OPERATIONS and min(done.values()) > 50 and min(kinds.values()) > 50
    assert inspect_folder(str(folder), check_hashes=True)["healthy"]
