"""Exact search: the same answers as a plain matrix product; damage and mismatch are refused."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmvis.index import (
    SOURCE,
    Index,
    IndexInfo,
    IndexMismatchError,
    bf16,
    build,
    exact,
    open_index,
    plan_kind,
)
from llmvis.storage import LocalStore, StorageError

DIM = 24
MODEL = {"name": "tiny", "fingerprint": "f" * 64, "dim": DIM, "licence": "none"}


def unit(rows: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def table(vectors: np.ndarray, first: int = 0) -> pa.Table:
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    ids = [f"id{first + i}" for i in range(len(vectors))]
    return pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})


def make(path: Path, *parts: np.ndarray, shard_rows: int = 10**6) -> Index:
    store = LocalStore(path)
    starts = np.cumsum([0, *(len(p) for p in parts)])
    with store.lock():
        build(
            store,
            IndexInfo(model=MODEL, source={}),
            (table(p, s) for p, s in zip(parts, starts, strict=False)),
            plan=replace(plan_kind("flat", 0, DIM, 1.0), shard_rows=shard_rows),
        )
    return open_index(str(path), MODEL["fingerprint"])


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    scores = queries @ vectors.astype(np.float16).astype(np.float32).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("count", [1, 12, 13, 90])
@pytest.mark.parametrize(("shard_rows", "block_rows"), [(10**6, 65_536), (100, 33), (7, 5)])
def test_answers_are_those_of_a_matrix_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_rows: int, block_rows: int, count: int
) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", block_rows)
    vectors, queries = unit(257), unit(count, seed=1)
    index = make(tmp_path, vectors[:100], vectors[100:101], vectors[101:], shard_rows=shard_rows)
    scores, rows = index.search(queries, 20)
    np.testing.assert_array_equal(rows, brute_force(vectors, queries, 20))
    assert (np.diff(scores, axis=1) <= 0).all()
    assert [m["id"] for m in index.metadata(rows[0])] == [f"id{r}" for r in rows[0]]


@pytest.mark.parametrize("count", [1, 12, 13, 90])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.95, 1.0])
def test_a_mask_leaves_what_a_matrix_product_of_the_rest_finds(
    monkeypatch: pytest.MonkeyPatch, share: float, count: int
) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", 64)
    vectors, queries = unit(1500), unit(count, seed=1)
    allowed = np.random.default_rng(2).random(1500) < share
    allowed[128:192], allowed[192:256] = False, share > 0  # a block of none, a block of all
    codes = vectors.astype(np.float16)
    shards = [exact.Shard(0, codes[:700]), exact.Shard(700, codes[700:])]
    _, rows = exact.nearest(shards, queries, 20, allowed)
    left = np.flatnonzero(allowed)
    np.testing.assert_array_equal(rows, left[brute_force(vectors[left], queries, 20)])
    if share == 0.3:
        some = np.array([900, 3, 1400, 650])
        for query, (few, found) in enumerate(exact.nearest_of(shards, q, some, 3) for q in queries):
            only = np.isin(np.arange(1500), some)
            same = exact.nearest(shards, queries[query : query + 1], 3, only)
            assert (few.tobytes(), found.tolist()) == (same[0].tobytes(), same[1][0].tolist())


def nearly_the_same(rows: int) -> np.ndarray:
    """Vectors that bfloat16 cannot tell apart."""
    return np.asarray(unit(1, seed=4) + 1e-3 * unit(rows, seed=5), np.float32)


@pytest.mark.parametrize("count", [13, 90])
@pytest.mark.parametrize(
    ("vectors", "quick"),
    [
        (unit(3000), True),
        (unit(3000) * np.geomspace(1e-3, 1e3, 3000, dtype=np.float32)[:, None], False),
        (unit(3000) * np.geomspace(1e3, 1e-3, 3000, dtype=np.float32)[:, None], True),
        (np.concatenate([unit(100), nearly_the_same(60), unit(2840, seed=7)]), True),
        (nearly_the_same(3000), False),
        (np.repeat(unit(30), 100, axis=0), False),
    ],
    ids=["unit", "growing", "shrinking", "some alike", "all alike", "equal"],
)
def test_a_sieve_of_bfloat16_loses_no_answer(
    monkeypatch: pytest.MonkeyPatch, vectors: np.ndarray, quick: bool, count: int
) -> None:
    codes, queries = vectors.astype(np.float16), unit(count, seed=1)
    codes.flags.writeable = False  # as a map is
    shards = [exact.Shard(0, codes[:1000]), exact.Shard(1000, codes[1000:])]
    monkeypatch.setattr(exact, "BLOCK_ROWS", 64)
    left: list[float | None] = []
    real = bf16.Sieve.left

    def counted(self: bf16.Sieve, vectors: np.ndarray, least: np.ndarray) -> object:
        found = real(self, vectors, least)
        left.append(None if found is None else len(found[0]) / len(least) / len(vectors))
        return found

    monkeypatch.setattr(bf16.Sieve, "left", counted)
    some = np.random.default_rng(3).random(3000) < 0.5
    for allowed in (None, some):
        monkeypatch.setattr(exact, "_sieve_pays", lambda work: False)
        slow = exact.nearest(shards, queries, 7, allowed)
        assert not left
        monkeypatch.setattr(exact, "_sieve_pays", lambda work: True)  # where it is not native, it is imitated
        fast = exact.nearest(shards, queries, 7, allowed)
        np.testing.assert_allclose(fast[0], slow[0], rtol=1e-6, atol=1e-6)
        if len(np.unique(codes, axis=0)) == 3000:  # which of equal ones come last is left open
            np.testing.assert_array_equal(fast[1], slow[1])
        shares = [share for share in left if share is not None]
        assert len(left) > 20 and (len(shares) > len(left) / 2) == quick
        left.clear()


def test_a_sieve_leaves_whatever_reaches_the_least_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of its docstring, where it is nearly reached: every number rounds by half a step."""
    monkeypatch.setattr(bf16, "MOST_LEFT", 1.0)
    half = np.full((1, DIM), 1 + 2.0**-8, np.float32)  # rounds to 1, to the even one
    for sign in (1, -1):
        score = np.full(1, sign * float(half[0] @ half[0]), np.float32)
        assert bf16.Sieve(half, 4).left(sign * half, np.nextafter(score, -np.inf)) is not None
        for vectors in (sign * half, np.repeat(sign * half, 4, 0)):
            query, place = bf16.Sieve(half, 4).left(vectors, score) or ([], [])
            assert (len(query), list(place)) == (len(vectors), list(range(len(vectors))))
    far = bf16.Sieve(half, 1).left(half, np.full(1, 1.03 * DIM, np.float32))
    assert far is not None and len(far[0]) == 0, "and not more than it must"


def test_ids_are_found_by_row_the_first_of_equal_ones(tmp_path: Path) -> None:
    with make(tmp_path, unit(20), unit(5), shard_rows=7) as index:  # the second five are id20 … id24
        asked = pa.array(["id3", "none", None, "id24", "id3", "id0"])
        assert index.rows_of(asked).tolist() == [3, -1, -1, 24, 3, 0]
        assert index.rows_of(pa.array([], pa.string())).tolist() == []


def test_k_asked_is_k_got_up_to_all_there_is(tmp_path: Path) -> None:
    index = make(tmp_path, unit(5))
    for k, got in ((1, 1), (5, 5), (50, 5)):
        rows = index.search(unit(2, seed=1), k)[1]
        assert rows.shape == (2, got)
        assert all(len(set(r)) == got for r in rows)


def test_several_threads_answer_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", 3)
    vectors, queries = unit(257), unit(3, seed=1)
    with make(tmp_path, vectors, shard_rows=50) as index:
        for threads in ("1", "3"):
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
            np.testing.assert_array_equal(index.search(queries, 20)[1], brute_force(vectors, queries, 20))


def test_equal_scores_keep_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", 3)
    same = np.repeat(unit(1), 10, axis=0)
    assert make(tmp_path, same).search(unit(1), 4)[1].tolist() == [[0, 1, 2, 3]]


def test_an_empty_index_answers_nothing(tmp_path: Path) -> None:
    assert make(tmp_path).search(unit(2), 3)[1].shape == (2, 0)


def test_another_model_or_dimension_is_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "a", unit(5))
    with pytest.raises(IndexMismatchError, match="made with tiny"):
        open_index(str(tmp_path / "a"), "e" * 64)
    with pytest.raises(IndexMismatchError, match="24 dimensions"):
        index.search(np.zeros((1, 8), np.float32), 1)
    with pytest.raises(IndexMismatchError, match="have 8 dimensions"):
        build(LocalStore(tmp_path / "b"), IndexInfo(model=MODEL, source={}), [table(np.zeros((2, 8)))])
    with pytest.raises(StorageError, match="is no index"):
        open_index(str(tmp_path / "b"))


def test_a_question_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    index = make(tmp_path, unit(5))
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((1, DIM), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="at least 1"):
        index.search(unit(1), 0)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "good", unit(40)).close()
    rng = random.Random(0)
    found = [p.relative_to(tmp_path / "good") for p in (tmp_path / "good").rglob("*") if p.is_file()]
    files = sorted(f for f in found if f.name != ".lock")
    assert len(files) == 4
    for trial in range(80):
        bad = tmp_path / f"bad{trial}"
        shutil.copytree(tmp_path / "good", bad)
        victim = bad / files[trial % len(files)]
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(bytes(data))
        with pytest.raises(StorageError):
            open_index(str(bad), MODEL["fingerprint"])


def test_every_bit_of_current_counts(tmp_path: Path) -> None:
    make(tmp_path, unit(4)).close()
    good = (tmp_path / "CURRENT").read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "CURRENT").write_bytes(bytes(bad))
        with pytest.raises(StorageError):
            open_index(str(tmp_path))


def test_a_new_build_takes_over_and_an_open_reader_keeps_the_old_one(tmp_path: Path) -> None:
    old = make(tmp_path, unit(5))
    new = make(tmp_path, unit(8))
    assert (old.rows, new.rows) == (5, 8)
    assert old.search(unit(1), 5)[1].shape == (1, 5)
    assert (tmp_path / "CURRENT").read_text().startswith("000002 ")


def test_only_the_last_two_versions_are_kept(tmp_path: Path) -> None:
    for rows in (3, 4, 5, 6):
        make(tmp_path, unit(rows)).close()
    kept = sorted(p.name for p in (tmp_path / "manifests").iterdir())
    assert kept == ["000003.json", "000004.json"]
    assert {p.name[:6] for p in (tmp_path / "shards").iterdir()} == {"000003", "000004"}


def test_the_version_in_force_outlives_a_build_that_was_killed(tmp_path: Path) -> None:
    make(tmp_path, unit(3)).close()
    make(tmp_path, unit(4)).close()
    orphan = (tmp_path / "manifests" / "000002.json").read_bytes()  # as if killed before CURRENT
    (tmp_path / "manifests" / "000003.json").write_bytes(orphan)
    make(tmp_path, unit(5)).close()
    kept = sorted(p.name for p in (tmp_path / "manifests").iterdir())
    assert kept == ["000002.json", "000004.json"], "a reader may be opening 2"
    assert {p.name[:6] for p in (tmp_path / "shards").iterdir()} == {"000002", "000004"}


def test_an_addition_killed_before_its_sweep_is_swept_up_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (3, 4):
        make(tmp_path, unit(rows)).close()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def add() -> None:
        build(LocalStore(tmp_path), IndexInfo(model=MODEL, source={}), [table(unit(9))], add=True)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmvis.index.publish.sweep", killed)
        add()
    add()
    assert sorted(p.name for p in (tmp_path / "manifests").iterdir()) == ["000002.json", "000003.json"]


def test_a_build_that_fails_leaves_the_old_version_in_force(tmp_path: Path) -> None:
    make(tmp_path, unit(5)).close()

    def tables() -> object:
        yield table(unit(3))
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="fire"):
        build(LocalStore(tmp_path), IndexInfo(model=MODEL, source={}), tables())  # type: ignore[arg-type]
    assert open_index(str(tmp_path)).rows == 5


def test_added_rows_stand_beside_the_old_ones_and_known_ids_stay_out(tmp_path: Path) -> None:
    vectors = unit(40)
    make(tmp_path, vectors[:20]).close()
    more = IndexInfo(model=MODEL, source={"kind": "another"})
    for _ in range(2):  # the second time there is nothing new
        built = build(
            LocalStore(tmp_path), more, [table(vectors[10:30], 10), table(vectors[30:], 30)], add=True
        )
        assert (built["version"], built["rows"], len(built["shards"])) == (2, 40, 2)
    with open_index(str(tmp_path), MODEL["fingerprint"]) as index:
        _, rows = index.search(unit(5, seed=1), 40)
        np.testing.assert_array_equal(rows, brute_force(vectors, unit(5, seed=1), 40))
        assert [m["id"] for m in index.metadata(np.arange(40))] == [f"id{i}" for i in range(40)]
        assert [m[SOURCE] for m in index.metadata(np.array([0, 19, 20, 39]))] == [0, 0, 1, 1]
        assert index.sources == [{}, {"kind": "another"}]


def test_what_was_there_before_an_addition_stays_open_for_readers(tmp_path: Path) -> None:
    vectors = unit(30)
    old = make(tmp_path, vectors[:10])
    for at in (10, 20):
        build(
            LocalStore(tmp_path),
            IndexInfo(model=MODEL, source={}),
            [table(vectors[at : at + 10], at)],
            add=True,
        )
    assert old.search(unit(1, seed=1), 50)[1].shape == (1, 10)
    assert make(tmp_path, vectors[:5]).rows == 5  # a build of its own takes the place of all
    names = LocalStore(tmp_path).names("shards")
    assert len(names) == 8, "files of the version before, and of this one"


def test_adding_to_another_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path, unit(5))
    other = IndexInfo(model={**MODEL, "fingerprint": "a" * 64}, source={})
    with pytest.raises(IndexMismatchError, match="was made with tiny"):
        build(LocalStore(tmp_path), other, [table(unit(5))], add=True)
    with pytest.raises(StorageError, match="is no index"):
        build(LocalStore(tmp_path / "none"), other, [table(unit(5))], add=True)
