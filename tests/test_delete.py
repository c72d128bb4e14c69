"""Deleted rows are never found, in any kind; the rest is found as before; what is damaged or false is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_approximate import MODEL, PICTURES, ROWS, brute_force, found, make, table, texts

from llmvis.cleanup import clean
from llmvis.index import IndexInfo, build, delete, open_index
from llmvis.inspection import inspect_folder
from llmvis.schema import UserError
from llmvis.storage import LocalStore, StorageError, sha256_bytes

KINDS = ("flat", "ivf_sq8", "ivf_rabitq")
DEAD = np.sort(np.random.default_rng(8).permutation(ROWS)[: ROWS * 3 // 10])
ALIVE = np.setdiff1d(np.arange(ROWS), DEAD)


def ids(rows: np.ndarray) -> pa.Array:
    return pa.array([f"id{row}" for row in rows])


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 rows in three shards, 30 % of them deleted."""
    path = tmp_path_factory.mktemp(request.param) / "idx"
    make(path, request.param)
    done = delete(LocalStore(path), ids=ids(DEAD))
    assert (done.asked, done.not_found, done.deleted, done.rows) == (len(DEAD), 0, len(DEAD), len(ALIVE))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """300 rows in shards of 64, exact."""
    make(tmp_path / "idx", "flat", 300, shard_rows=64)
    return tmp_path / "idx"


@pytest.mark.parametrize("count", [3, 40])
def test_k_asked_is_k_got_and_none_of_them_is_deleted(
    made: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("llmvis.index.opened.FEW_ROWS", 0)  # by lists, as a large index does it
    queries = texts(np.random.default_rng(5).permutation(ROWS)[:count], seed=6)
    conditions: list[tuple[str | None, np.ndarray]] = [
        (None, ALIVE), ("half", ALIVE[ALIVE % 2 == 0]), ("mille < 5", ALIVE[ALIVE % 1000 < 5])
    ]  # fmt: skip
    with open_index(str(made)) as index:
        assert (index.rows, index.total) == (len(ALIVE), ROWS)
        for where, left in conditions:
            for k in (10, len(left), ROWS):
                true = brute_force(queries, k, left)
                exact = index.search(queries, k, where=where, exact=True)[1]
                # of thousands some scores are equal but for rounding
                np.testing.assert_array_equal(exact[:, :10], true[:, :10])
                np.testing.assert_array_equal(np.sort(exact), np.sort(true))
                scores, rows = index.search(queries, k, where=where)
                assert rows.shape == true.shape == (count, min(k, len(left)))
                assert np.isin(rows, left).all() and all(len(set(each)) == len(each) for each in rows)
                assert found(rows, true) >= 0.93
                whole = PICTURES[rows].astype(np.float16).astype(np.float32)
                np.testing.assert_allclose(scores, (whole * queries[:, None]).sum(2), atol=1e-6)


def test_ids_are_those_of_the_living(made: Path) -> None:
    with open_index(str(made)) as index:
        assert index.ids() == set(ids(ALIVE).to_pylist())
        asked = np.arange(0, ROWS, 7)
        rows = index.rows_of(ids(asked))
        np.testing.assert_array_equal(rows, np.where(np.isin(asked, DEAD), -1, asked))


def test_what_is_deleted_already_is_no_error_and_makes_no_version(small: Path) -> None:
    store = LocalStore(small)
    first = delete(store, ids=pa.array(["id7", "id8", "id7", "none", None]))
    assert (first.asked, first.not_found, first.deleted, first.dead) == (3, 1, 2, 2)
    again = delete(store, ids=pa.array(["id7", "none"]))
    assert (again.asked, again.not_found, again.deleted, again.dead) == (2, 2, 0, 2)
    assert again.manifest == first.manifest and first.manifest["version"] == 2
    more = delete(store, ids=pa.array(["id8", "id299"]))
    assert (more.not_found, more.deleted, more.dead, more.rows) == (1, 1, 3, 297)
    with open_index(str(small)) as index:
        assert index.ids() == set(ids(np.setdiff1d(np.arange(300), [7, 8, 299])).to_pylist())


def test_a_condition_and_ids_delete_what_both_name(small: Path) -> None:
    store = LocalStore(small)
    look = delete(store, where="mille < 20", dry_run=True)
    assert (look.deleted, look.asked, look.manifest["version"]) == (20, None, 1)
    assert [row["id"] for row in look.examples] == ["id0", "id1", "id2"]
    done = delete(store, ids=ids(np.arange(10, 60)), where="mille < 20")
    assert (done.asked, done.not_found, done.deleted) == (50, 0, 10)
    assert delete(store, where="mille < 20").deleted == 10, "those that are left"
    with pytest.raises(UserError, match="--ids, --where"):
        delete(store)


def test_all_can_be_deleted_and_an_empty_index_answers_nothing(small: Path) -> None:
    assert delete(LocalStore(small), where="1 == 1").rows == 0
    with open_index(str(small)) as index:
        for count in (2, 30):
            assert index.search(texts(np.arange(count), 1), 5)[1].shape == (count, 0)
        assert (index.rows, index.ids()) == (0, set())


def test_an_id_that_several_rows_have_is_deleted_with_all_of_them(tmp_path: Path) -> None:
    build(LocalStore(tmp_path), IndexInfo(model=MODEL, source={}), [table(0, 30), table(0, 5)])
    done = delete(LocalStore(tmp_path), ids=pa.array(["id3"]))
    assert (done.asked, done.deleted, done.rows) == (1, 2, 33)


def test_a_reader_of_the_version_before_answers_as_before(small: Path) -> None:
    queries = texts(np.arange(5), 3)
    with open_index(str(small)) as old:
        before = old.search(queries, 300)[1]
        delete(LocalStore(small), where="half")
        np.testing.assert_array_equal(old.search(queries, 300)[1], before)
        assert old.metadata(before[0, :3]) and old.rows == 300
    version = (small / "CURRENT").read_text()
    manifest = (small / "manifests/000001.json").read_bytes()
    (small / "CURRENT").write_text(f"000001 {sha256_bytes(manifest)}\n")
    with open_index(str(small)) as late:  # read CURRENT just before the swap
        np.testing.assert_array_equal(late.search(queries, 300)[1], before)
    (small / "CURRENT").write_text(version)


def test_old_bitmaps_go_when_no_reader_can_be_opening_them(small: Path) -> None:
    for row in range(3):
        delete(LocalStore(small), ids=ids(np.array([row])))
    names = [path.name for path in (small / "shards").glob("*.deleted")]
    assert sorted(names) == ["000003.deleted", "000004.deleted"]
    assert sorted(p.name for p in (small / "manifests").iterdir()) == ["000003.json", "000004.json"]
    assert clean(str(small), keep=1) and (small / "shards/000004.deleted").exists()
    with open_index(str(small)) as index:
        assert index.rows == 297


def test_a_deletion_killed_before_it_cleared_away_is_cleared_by_the_rerun(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(small)
    delete(store, ids=ids(np.arange(5)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmvis.index.publish.sweep", killed)
        delete(store, ids=ids(np.arange(10)))
    assert clean(str(small), dry_run=True)
    assert delete(store, ids=ids(np.arange(10))).deleted == 0
    assert not clean(str(small), dry_run=True)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_inspect_counts_the_deleted_and_checks_their_list(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "idx"))
    (part,) = inspect_folder(str(copy), check_hashes=True)["parts"]
    assert (part["rows"], part["deleted"], len(part["advice"])) == (ROWS, len(DEAD), 1)
    assert part["problems"] == []
    run = cli("inspect", str(copy))
    assert "1,800 of them deleted (30%)" in run.stdout and "--compact" in run.stdout
    bitmap = copy / "shards/000002.deleted"
    data = bytearray(bitmap.read_bytes())
    data[7] ^= 4
    bitmap.write_bytes(bytes(data))
    (part,) = inspect_folder(str(copy), check_hashes=True)["parts"]
    assert [problem["what"] for problem in part["problems"]] == [
        "shards/000002.deleted is damaged: its sha256 differs"
    ]
    with pytest.raises(StorageError, match="damaged"):
        open_index(str(copy))
    with pytest.raises(StorageError, match="damaged"):
        delete(LocalStore(copy), ids=ids(ALIVE[:1]))


def signed(path: Path, change: Callable[[dict[str, Any], Path], None]) -> None:
    """Opens the index after a change that whoever can write it has made, with right hashes."""
    file = path / "manifests" / "000002.json"
    manifest = json.loads(file.read_text())
    change(manifest, path)
    file.write_text(json.dumps(manifest))
    (path / "CURRENT").write_text(f"000002 {hashlib.sha256(file.read_bytes()).hexdigest()}\n")
    open_index(str(path)).close()


def put(bits: bytes, **entry: Any) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], path: Path) -> None:
        (path / manifest["deleted"]["name"]).write_bytes(bits)
        manifest["deleted"] |= {"sha256": sha256_bytes(bits), "bytes": len(bits), **entry}

    return change


def said(**entry: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda manifest, path: manifest["deleted"].update(entry)


HARM: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "elsewhere": (said(name="../../etc/passwd"), "said to lie in"),
    "a shard's file": (said(name="shards/000001-00000.npy"), "said to lie in"),
    "no hash": (said(sha256=None), "no hash"),
    "no entry": (lambda m, _: m.update(deleted=None), "no hash"),
    "more rows than there are": (said(rows=301), "301 deleted rows of 300"),
    "none": (said(rows=0), "0 deleted rows"),
    "true rows": (said(rows=True), "True deleted rows"),
    "other count": (said(rows=3), "does not mark 3 rows"),
    "other length": (said(bytes=7), "does not mark 2 rows"),
    "no length": (said(bytes="7"), "'7' bytes"),
    "longer than the index": (put(bytes([3] + 300 * [0]), rows=2), "301 bytes for 300 rows"),
    "rows beyond the last": (put(bytes([1] + 36 * [0] + [128]), rows=2), "does not mark 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_changed_list_of_deleted_rows_with_a_right_hash_is_refused(small: Path, harm: str) -> None:
    delete(LocalStore(small), ids=pa.array(["id0", "id1"]))
    change, words = HARM[harm]
    with pytest.raises(StorageError, match=words):
        signed(small, change)


def test_rows_that_the_list_does_not_reach_are_alive(small: Path) -> None:
    """As after rows were added."""
    delete(LocalStore(small), ids=pa.array(["id0", "id1"]))
    signed(small, put(bytes([0, 3]), rows=2))
    with open_index(str(small)) as index:
        assert index.ids() == set(ids(np.setdiff1d(np.arange(300), [8, 9])).to_pylist())


def cli(*args: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, "-m", "llmvis.cli", *args], capture_output=True, text=True)
    assert run.returncode == expect, run.stderr
    return run


def test_the_command_takes_a_text_or_parquet_and_says_what_it_did(small: Path, tmp_path: Path) -> None:
    lines, rows = tmp_path / "gone.txt", tmp_path / "gone.parquet"
    lines.write_text("id1\nid2\r\n\nnone\n")
    pq.write_table(pa.table({"id": ids(np.arange(100))}), rows)
    run = cli("delete", "--index", str(small), "--ids", str(lines), "--dry-run")
    assert run.stdout.splitlines() == [
        "2 would be deleted by 3 ids, of which 1 are not there; 298 stay", "  id1  ", "  id2  "
    ]  # fmt: skip
    run = cli("delete", "--index", str(small), "--ids", str(lines))
    assert run.stdout == "2 deleted by 3 ids, of which 1 are not there; 298 stay (version 2)\n"
    run = cli("delete", "--index", str(small), "--ids", str(rows), "--where", "mille >= 10", "--json")
    assert json.loads(run.stdout) == {
        "version": 3, "asked": 100, "not_found": 2, "deleted": 90, "rows": 208, "dead": 92, "dry_run": False
    }  # fmt: skip
    run = cli("delete", "--index", str(small), "--where", "half")
    assert run.stdout.splitlines()[1].startswith("advice: 65% of the rows in its files are deleted")


def test_the_command_refuses_what_it_cannot_read(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "y.parquet")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    for name in ("x.parquet", "y.parquet", "latin.txt", "none.txt"):
        run = cli("delete", "--index", str(small), "--ids", str(tmp_path / name), expect=1)
        assert f"--ids {tmp_path / name}" in run.stderr and "Traceback" not in run.stderr
    assert "--ids, --where" in cli("delete", "--index", str(small), expect=2).stderr
    assert (
        "is no index" in cli("delete", "--index", str(tmp_path / "no"), "--where", "1 == 1", expect=1).stderr
    )
    assert not (tmp_path / "no").exists()
    assert LocalStore(small).names("manifests") == ["manifests/000001.json"]
