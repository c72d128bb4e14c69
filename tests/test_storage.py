"""Files are whole or not there; a lock goes with its process; damage is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmvis.storage import LocalStore, LockedError, StorageError, local_path, sha256_bytes


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a/x.json", b"old")
    with pytest.raises(RuntimeError), store.create("a/x.json") as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert store.read("a/x.json") == b"old"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]


def test_a_file_under_construction_is_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with store.create("data/x") as file:
        file.write(b"1")
        assert store.names("data") == []
    assert store.names("data") == ["data/x"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ""])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain name"):
        LocalStore(tmp_path).path(name)


def test_two_drivers_cannot_hold_one_folder_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from llmvis.storage import LocalStore\n"
        f"with LocalStore({str(tmp_path)!r}).lock(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(LockedError, match=str(other.pid)), LocalStore(tmp_path).lock():
            pass
        other.kill()
        other.wait()
        with LocalStore(tmp_path).lock():
            pass


def test_sweep_removes_what_is_not_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("data/a", "data/b", "data/.aside-1"):
        store.write(name, b"")
    assert store.sweep("data", {"data/a"}) == 2
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    store = LocalStore(tmp_path)
    assert store.fetch("x", sha256_bytes(b"abc")) == path
    path.write_bytes(b"abb")
    with pytest.raises(StorageError, match="damaged"):
        store.fetch("x", sha256_bytes(b"abc"))
    with pytest.raises(StorageError, match="damaged"):
        store.read_checked("x", sha256_bytes(b"abc"))
    with pytest.raises(StorageError, match="missing"):
        store.read_checked("y", sha256_bytes(b"abc"))


def test_a_scheme_that_is_not_served_says_so() -> None:
    with pytest.raises(StorageError, match="must be a local folder"):
        local_path("s3://bucket/key")
    assert local_path("file:///tmp/x") == Path("/tmp/x")


def test_foreign_json_is_refused_with_words(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("plan.json", b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        store.read_json("plan.json")
    store.write("plan.json", b"[]")
    with pytest.raises(StorageError, match="no JSON object"):
        store.read_json("plan.json")
