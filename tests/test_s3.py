"""S3: the same promises as on a disk, from a real server that is made to misbehave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from botocore.config import Config
from s3_server import BUCKET, FAULTS, Faults, Server, faulty

from llmvis import cli
from llmvis.cleanup import clean
from llmvis.config import FilterConfig
from llmvis.index import open_index
from llmvis.inspection import inspect_folder
from llmvis.ledger import parquet_bytes, read_data, read_manifest
from llmvis.schema import item_id
from llmvis.sources import SourceError
from llmvis.sources.prompts import PromptSource
from llmvis.sources.queries import open_queries
from llmvis.storage import LocalStore, LockedError, StorageError, Store, open_store, s3_client, s3_lock
from llmvis.storage import s3 as s3_module
from llmvis.storage.s3 import S3Store
from tests.stores import read, rows

TESTS = Path(__file__).parent


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "disk":
        return LocalStore(tmp_path / "root")
    server: Server = request.getfixturevalue("s3")
    return open_store(server.uri(f"contract/{tmp_path.name}"))


def client(server: Server) -> Any:
    return boto3.client(
        "s3", endpoint_url=server.endpoint, config=Config(s3={"addressing_style": "path"}),
    )  # fmt: skip


def test_what_a_store_promises(store: Store) -> None:
    assert (store.top(), store.names("data"), store.size("data/a"), store.exists("data/a")) == (
        [],
        [],
        None,
        False,
    )
    with pytest.raises(FileNotFoundError):
        store.read("data/a")
    with store.lock():
        store.write("data/b", b"old")
        store.write("data/b", b"new")
        store.write("data/a", b"")
        store.write_json("plan.json", {"x": "ü"})
        with store.create("data/c") as file:
            file.write(b"01234")
            file.write(b"56789")
        assert (file.bytes, len(file.sha256)) == (10, 64)
        assert store.sizes("data") == {"data/a": 0, "data/b": 3, "data/c": 10}
        assert store.read_all(["data/b", "data/a"]) == [b"new", b""]
        assert store.read_json("plan.json") == {"x": "ü"}
        assert store.read_range("data/c", 3, 4) == b"3456"
        assert store.read_range("data/c", 8, 99) == b"89"
        assert store.fetch("data/c", file.sha256).read_bytes() == b"0123456789"
        with store.open("data/c") as opened:
            opened.seek(7)
            assert opened.read() == b"789"
        with store.written("page.html") as path:
            path.write_text("hello")
        assert store.top() == [".lock", "data", "page.html", "plan.json"]
        assert store.sweep("data", {"data/b"}) == 2
        assert store.names("data") == ["data/b"]
        assert store.below("data").read("b") == b"new"
        store.delete("data")
        store.delete("data")
        assert store.names("data") == []


def test_a_writer_that_fails_publishes_nothing(store: Store) -> None:
    with store.lock():
        store.write("x", b"old")
        with pytest.raises(RuntimeError), store.create("x") as file:
            file.write(b"half of the new")
            raise RuntimeError
        with pytest.raises(RuntimeError), store.written("x") as path:
            path.write_bytes(b"half of the new")
            raise RuntimeError
        assert store.read("x") == b"old"


def test_a_changed_file_is_refused(store: Store) -> None:
    with store.lock():
        with store.create("x") as file:
            file.write(b"abc")
        store.write("x", b"abd")
    with pytest.raises(StorageError, match="damaged"):
        store.read_checked("x", file.sha256)
    with pytest.raises(StorageError, match="damaged"):
        store.fetch("x", file.sha256)
    with pytest.raises(StorageError, match="missing"):
        store.fetch("y", file.sha256)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ""])
def test_names_cannot_leave_the_prefix(s3: Server, name: str) -> None:
    with pytest.raises(ValueError, match="plain name"):
        open_store(s3.uri("inside")).read(name)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://b/x/../y", "s3://b/x?region=y", "s3://b/x//y"])
def test_what_is_no_place_in_s3_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"write s3://bucket/prefix"):
        open_store(uri)


def test_a_name_with_credentials_is_refused_without_showing_them() -> None:
    with pytest.raises(StorageError, match="must not hold credentials") as refused:
        open_store("s3://key:canary@bucket/x")
    assert "canary" not in str(refused.value)


def test_wrong_credentials_and_a_dead_server_fail_fast_and_in_words(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3_client.forget()
    begun = time.monotonic()
    try:
        for ask in (lambda s: s.read("a"), lambda s: s.names("a"), lambda s: s.write("a", b"")):
            with pytest.raises(StorageError, match=r"access is denied\. Check the credentials"):
                ask(open_store(s3.uri("x")))
    finally:
        s3_client.forget()
    assert time.monotonic() - begun < 10
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="has not answered as it should for 1 s"):
        S3Store(s3.uri("x"), patience_s=1).names("a")


@pytest.mark.parametrize("fault", [*FAULTS, "lost"])
def test_each_fault_is_outlasted(s3: Server, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults({} if fault == "lost" else {fault: 0.3}, hang_s=5, lost_answers=0.5 * (fault == "lost"))
    monkeypatch.setattr(s3_client, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(s3_client, "FIRST_WAIT_S", 0.01)
    with faulty(s3, faults) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.endpoint)
        store = open_store(s3.uri(f"faults/{fault}"))
        with store.lock():
            for i in range(6):
                store.write(f"d/{i}", bytes([i]) * 5_000)
            assert store.read_all([f"d/{i}" for i in range(6)]) == [bytes([i]) * 5_000 for i in range(6)]
            assert store.names("d") == [f"d/{i}" for i in range(6)]
            store.sweep("d", {"d/0"})
            assert store.names("d") == ["d/0"]
        assert not store.exists(".lock")
    assert faults.fired[fault] >= 3, faults.fired


def test_a_large_file_is_sent_in_parts_and_again_where_one_fails(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 2**20)
    faults = Faults({"busy": 0.15, "reset": 0.1, "cut": 0.1}, seed=1)
    data = os.urandom(23 * 2**20)
    with faulty(s3, faults) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.endpoint)
        store = open_store(s3.uri("large"))
        store.write("x", data)
        assert store.read("x") == data
    assert sum(faults.fired.values()) >= 2
    assert not client(s3).list_multipart_uploads(Bucket=BUCKET, Prefix="large/").get("Uploads")


def test_what_a_killed_writer_left_of_an_upload_is_cleared(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal\nfrom llmvis.storage import open_store, s3\ns3.PART_BYTES = 5 << 20\n"
        f"store = open_store({s3.uri('killed')!r})\nsend = store._s3.upload_part\n"
        "def upload_part(**kw):\n    answer = send(**kw)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store._s3.upload_part = upload_part\nstore.write('data/x', bytes(20 << 20))\n"
    )
    run = subprocess.run([sys.executable, "-c", code])
    assert run.returncode == -signal.SIGKILL
    assert len(client(s3).list_multipart_uploads(Bucket=BUCKET, Prefix="killed/")["Uploads"]) == 1
    store = open_store(s3.uri("killed"))
    assert not store.exists("data/x")
    store.clear_unfinished()
    assert not client(s3).list_multipart_uploads(Bucket=BUCKET, Prefix="killed/").get("Uploads")


HOLD = (
    "import sys, time\nfrom llmvis.storage import open_store, s3_lock\ns3_lock.BEAT_S = 0.3\n"
    "if len(sys.argv) > 2: s3_lock._machine = lambda: sys.argv[2]\n"
    "with open_store(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
)


def holder(uri: str, *machine: str) -> subprocess.Popen[str]:
    other = subprocess.Popen([sys.executable, "-c", HOLD, uri, *machine], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline().strip() == "held"
    return other


def test_two_drivers_cannot_hold_one_prefix(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_lock, "SILENCE_S", 3.0)
    uri = s3.uri("locked/one")
    with holder(uri) as other:
        with pytest.raises(LockedError, match=f"in use by process {other.pid}"), open_store(uri).lock():
            pass
        other.kill()
        other.wait()
        begun = time.monotonic()
        with open_store(uri).lock():
            assert time.monotonic() - begun < 2  # its machine is this one, and it is not there
        assert not open_store(uri).exists(".lock")


def test_a_holder_killed_on_another_machine_is_waited_for_and_then_replaced(
    s3: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3_lock, "SILENCE_S", 2.0)
    uri = s3.uri("locked/two")
    with holder(uri, "elsewhere") as other:
        other.kill()
        other.wait()
        begun = time.monotonic()
        with open_store(uri).lock():
            assert time.monotonic() - begun >= 2
    assert "waiting 2 s to see whether it lives" in capsys.readouterr().err


def test_a_holder_that_was_cut_off_publishes_nothing_more(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_lock, "BEAT_S", 0.2)
    first, second = open_store(s3.uri("locked/three")), open_store(s3.uri("locked/three"))
    with first.lock():
        client(s3).delete_object(Bucket=BUCKET, Key="locked/three/.lock")
        with second.lock():
            time.sleep(0.6)
            with pytest.raises(LockedError, match="taken over by another process"):
                first.write("manifest.json", b"{}")
            second.write("manifest.json", b"{}")
        assert not second.exists(".lock")


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.write(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.mark.parametrize("kind", ["folder", "imagefolder", "parquet", "paths", "tar"])
def test_a_collection_on_bad_s3_is_the_one_on_disk(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    here, names = tmp_path / kind, tiny.pictures(tmp_path / kind, 40)
    (here / "00003.txt").write_text("a caption\nof two lines")
    if kind == "imagefolder":
        (here / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n},of {n}\n" for n in names))
    if kind in ("parquet", "paths"):
        data = [(here / n).read_bytes() for n in names]
        column = pa.array(data) if kind == "parquet" else pa.array([f"x/{n}" for n in names])
        table = pa.table({"image": column, "text": names})
        shutil.rmtree(here)
        tiny.pictures(here / "x", 40 * (kind == "paths"))
        pq.write_table(table, here / "t.parquet", row_group_size=7)
    if kind == "tar":
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for name in [*names, "00003.txt"]:
                tar.add(here / name, name)
        shutil.rmtree(here)
        here.mkdir()
        shutil.move(tmp_path / "t.tar", here / "t.tar")
    faults = Faults({"busy": 0.15, "reset": 0.05, "cut": 0.1, "delay": 0.05}, seed=5)
    upload(here, s3.uri(f"collections/{kind}"))
    end = "/t.parquet" if kind in ("parquet", "paths") else ""
    with faulty(s3, faults) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.endpoint)
        near, far = rows(f"{here}{end}"), rows(s3.uri(f"collections/{kind}") + end)
        times = {"mtime_ns": None, "caption_mtime_ns": None}
        assert [r | times for r in far] == [r | times for r in near]
        assert len(far) == 40
        assert read(s3.uri(f"collections/{kind}") + end, far) == read(f"{here}{end}", near)
    assert sum(faults.fired.values()) >= 1 or sum(faults.requests.values()) < 10


def test_prompts_lie_in_s3_too(s3: Server) -> None:
    open_store(s3.uri("asked")).write("p.csv", b"prompt,seed\na red fish,3\n")
    (table,) = PromptSource(s3.uri("asked/p.csv"), seeds=[0]).listing()
    assert (table["prompt"].to_pylist(), table["seed"].to_pylist()) == (["a red fish"], [3])
    with pytest.raises(SourceError, match=r"none\.csv cannot be read"):
        PromptSource(s3.uri("asked/none.csv"), seeds=[0])


def test_queries_lie_in_s3_too(s3: Server) -> None:
    store = open_store(s3.uri("queries"))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 8, pa.float32()), 4)
    store.write("a.csv", b"text\nred\ngreen\n")
    store.write("texts.parquet", parquet_bytes(pa.table({"text": ["red", "green"]})))
    for name in ("vectors.parquet", "several/vectors.parquet"):
        store.write(name, parquet_bytes(pa.table({"embedding": vectors})))
    for name in ("a.csv", "texts.parquet", "vectors.parquet", "several"):
        source = open_queries(s3.uri(f"queries/{name}"), None, None)
        assert source.texts == (name in ("a.csv", "texts.parquet"))
        assert sum(table.num_rows for table in source.listing()) == 2
    with pytest.raises(SourceError, match=r"none\.csv cannot be read"):
        open_queries(s3.uri("queries/none.csv"), None, None)


def drive(images: str, out: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / "tiny.py"), images, out]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


def check_whole(out: str, names: list[str]) -> None:
    store = open_store(out)
    manifest = read_manifest(store, "encode")
    rows = [row for file in manifest["files"] for row in read_data(store, file).to_pylist()]
    assert sorted(row["id"] for row in rows) == sorted(item_id(n.encode()) for n in names)
    assert store.names("data") == sorted(f["name"] for f in manifest["files"])
    assert manifest["ledger"]["written"] == manifest["ledger"]["input"] == len(names)
    assert store.top() == ["_commits", "data", "manifest.json", "plan", "plan.json", "report.json"]


def test_a_job_on_bad_s3_completes_with_an_exact_ledger(s3: Server, tmp_path: Path) -> None:
    names = tiny.pictures(tmp_path / "images", 200)
    faults = Faults({"busy": 0.2, "reset": 0.05, "cut": 0.05, "delay": 0.05}, lost_answers=0.05, seed=3)
    with faulty(s3, faults) as bad, drive(str(tmp_path / "images"), s3.uri("bad/enc"), bad.env) as run:
        told, _ = run.communicate(timeout=240)
        assert run.returncode == 0
    assert json.loads(told.splitlines()[-1])["ledger"]["written"] == 200
    check_whole(s3.uri("bad/enc"), names)
    assert min(faults.fired[name] for name in ("busy", "reset", "cut", "delay", "lost")) >= 1, faults.fired
    assert faults.fired["busy"] > 0.15 * sum(faults.requests.values())


def test_a_job_on_s3_whose_driver_is_killed_goes_on(s3: Server, tmp_path: Path) -> None:
    names = tiny.pictures(tmp_path / "images", 120)
    images, out = str(tmp_path / "images"), s3.uri("killed-driver/enc")
    with drive(images, out, {"TINY_DELAY": "0.2"}) as run:
        until = time.monotonic() + 120
        while len(open_store(out).names("_commits")) < 3:
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        run.kill()
    done = len(open_store(out).names("_commits"))
    assert 3 <= done < 15 and not open_store(out).exists("manifest.json")
    with drive(images, out, {}) as run:
        told, _ = run.communicate(timeout=240)
        assert run.returncode == 0
    assert json.loads(told.splitlines()[-1])["shards_resumed"] >= 3
    check_whole(out, names)


def test_an_index_on_s3_is_built_added_to_and_searched(s3: Server, tmp_path: Path, monkeypatch: Any) -> None:
    from jobs import index
    from llmvis.config import IndexConfig

    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path / "cache"))
    for part, count in (("a", 20), ("b", 30)):
        tiny.pictures(tmp_path / part, count)
        with drive(str(tmp_path / part), s3.uri(f"idx/{part}"), {}) as run:
            assert run.wait(timeout=240) == 0
    index.run(IndexConfig(embeddings=s3.uri("idx/a"), out=s3.uri("idx/idx")))
    index.run(IndexConfig(embeddings=s3.uri("idx/b"), out=s3.uri("idx/idx"), add=True))
    with open_index(s3.uri("idx/idx"), tiny.INFO.fingerprint) as opened:
        assert opened.rows == 30
        scores, rows = opened.search(tiny.TinyEncoder().encode_texts(["red"]), 3)
        assert scores.shape == rows.shape == (1, 3)
    cached = next((tmp_path / "cache").glob("*.npy"))
    cached.write_bytes(b"damaged")  # is noticed, and fetched again
    with open_index(s3.uri("idx/idx")) as opened:
        assert (opened.search(tiny.TinyEncoder().encode_texts(["red"]), 3)[1] == rows).all()


CHANGES = """
import sys
import tiny_search
from jobs import index
from llmvis import cli
from llmvis.cluster.session import session
from llmvis.config import IndexConfig
from llmvis.config_bulk import BatchSearchConfig
from llmvis.config_ops import DeleteConfig
from llmvis.index import planner

planner.SHARD_ROWS = 30
some, all_of_them, idx, ids, queries, out = sys.argv[1:]
with session(num_cpus=2):
    index.run(IndexConfig(embeddings=some, out=idx, kind="ivf_sq8", recall=0.9))
    index.run(IndexConfig(embeddings=all_of_them, out=idx, add=True))
    cli.run_delete(DeleteConfig(index=idx, ids=ids))
    tiny_search.run(BatchSearchConfig(index=idx, queries=queries, out=f"{out}/before", k=5))
    index.run(IndexConfig(out=idx, compact=True, retrain=True))
    tiny_search.run(BatchSearchConfig(index=idx, queries=queries, out=f"{out}/after", k=5))
"""


def test_lists_are_made_added_to_thinned_compacted_and_asked_on_bad_s3_by_tasks(
    s3: Server, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path / "cache"))
    tiny.pictures(tmp_path / "images", 120)
    upload(tmp_path / "images", s3.uri("lists/images"))
    with drive(s3.uri("lists/images"), s3.uri("lists/enc-all"), {}) as run:
        assert run.wait(timeout=240) == 0
    whole, some = open_store(s3.uri("lists/enc-all")), open_store(s3.uri("lists/enc-some"))
    manifest = whole.read_json("manifest.json")
    files = manifest["files"][:10]
    for file in files:
        some.write(file["name"], whole.read(file["name"]))
    some.write_json("manifest.json", {**manifest, "files": files, "rows": 80})
    colours = list(tiny.COLOURS)
    open_store(s3.uri("lists")).write("asked.csv", "\n".join(["text", *colours]).encode())
    ids = [item_id(f"{i:05}.png".encode()) for i in range(120)]
    gone = ids[::4]
    open_store(s3.uri("lists")).write("gone.txt", "\n".join(gone).encode())
    places = ("enc-some", "enc-all", "idx", "gone.txt", "asked.csv", "out")
    command = [sys.executable, "-c", CHANGES, *(s3.uri(f"lists/{place}") for place in places)]
    faults = Faults({"busy": 0.03, "reset": 0.02, "cut": 0.02}, lost_answers=0.03, seed=4)
    with faulty(s3, faults) as bad:
        done = subprocess.run(command, env={**os.environ, **bad.env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(faults.fired[name] for name in ("busy", "reset", "cut", "lost")) >= 1, faults.fired
    uri = s3.uri("lists/idx")
    assert inspect_folder(uri, check_hashes=True)["healthy"] and not clean(uri, dry_run=True)
    assert open_store(uri).top() == ["CURRENT", "manifests", "shards"]
    with open_index(uri, tiny.INFO.fingerprint) as opened:
        assert len(opened.manifest["shards"]) > 2 and opened.manifest["kind"] == "ivf_sq8"
        assert opened.ids() == set(ids) - set(gone) and opened.total == opened.rows
        best = opened.search(tiny.TinyEncoder().encode_texts(colours), 5, exact=True)[1]
        wanted = {
            name: [row["id"] for row in opened.metadata(rows)]
            for name, rows in zip(colours, best, strict=True)
        }
    for when in ("before", "after"):
        store = open_store(s3.uri(f"lists/out/{when}"))
        rows = [
            row
            for file in read_manifest(store, "search")["files"]
            for row in read_data(store, file).to_pylist()
        ]
        found = {row["text"]: [hit["id"] for hit in row["hits"]] for row in rows}
        assert found.keys() == wanted.keys() and not {i for some in found.values() for i in some} & set(gone)
        same = sum(len(set(found[name]) & set(wanted[name])) for name in colours)
        assert same >= 0.9 * 5 * len(colours)
    monkeypatch.setattr(cli, "load_encoder", tiny.load)
    cli.run_filter(FilterConfig(index=uri, text="red", out=str(tmp_path / "red"), most=3))
    assert len(list((tmp_path / "red").glob("**/*.png"))) == 3
