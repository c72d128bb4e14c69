"""Dead letters put back to work: what was mended comes in, nothing else is done again, readers never see a mix."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from llmvis import cli
from llmvis.config_ops import RetryConfig
from llmvis.ledger import read_data, read_manifest
from llmvis.plan import PlanError
from llmvis.retry import RETRY
from llmvis.schema import UserError
from llmvis.storage import LocalStore, StorageError

SHARD = 2


def broken_collection(folder: Path) -> list[str]:
    """Ten pictures of which 1 cannot be read, 4 is cut off and 8 is named and missing; returns their names."""
    names = tiny.pictures(folder, 10)
    rows = [json.dumps({"file_name": name, "caption": f"picture {name}", "note": 0.5}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (folder / names[1]).unlink()
    os.mkfifo(folder / names[1])
    whole = (folder / names[4]).read_bytes()
    (folder / names[4]).write_bytes(whole[: len(whole) // 2])
    (folder / names[8]).unlink()
    return names


def mend(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(folder / name)


def retry(out: Path, *reasons: str) -> None:
    cli.run_retry(RetryConfig(path=str(out), dead=True, reason=reasons))


def stamps(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "data").iterdir()}


def paths(store: LocalStore) -> list[str]:
    """The pictures that a reader gets by the manifest, every file checked."""
    manifest = read_manifest(store, "encode")
    return sorted(row["path"] for file in manifest["files"] for row in read_data(store, file).to_pylist())


def test_two_mended_of_three_come_in_and_no_other_shard_is_done_again(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    names = broken_collection(images)
    report: Any = tiny.run(str(images), str(out), SHARD)
    assert report["ledger"]["dead_by_reason"] == {"missing": 1, "truncated": 1, "unreadable": 1}
    before = stamps(out)
    mend(images, names[1])
    mend(images, names[4])
    with pytest.raises(PlanError, match="llmvis retry"):
        tiny.run(str(images), str(out), SHARD)
    retry(out)
    assert "tried again: 1 missing, 1 unreadable; shards to do: 2" in capsys.readouterr().out
    assert len(paths(LocalStore(out))) == 7, "readers lost the last result"
    report = tiny.run(str(images), str(out), SHARD)
    assert report["ledger"]["written"] == 9 and report["ledger"]["dead_by_reason"] == {"missing": 1}
    assert report["shards_resumed"] == 2, "the shards of the three dead letters, and no other"
    assert paths(LocalStore(out)) == sorted(set(names) - {names[8]})
    untouched = {name: stamp for name, stamp in before.items() if name[:6] in ("000003",)}
    assert untouched and untouched.items() <= stamps(out).items()
    again: Any = tiny.run(str(images), str(out), SHARD)
    assert again["already_done"], "the mended plan is not that of its input"
    mend(images, names[8])  # it now stands elsewhere in the listing
    retry(out)
    report = tiny.run(str(images), str(out), SHARD)
    assert report["ledger"]["written"] == 10 and report["shards_resumed"] == 4
    assert tiny.run(str(images), str(out), SHARD)["already_done"]


def test_what_was_not_dead_may_not_change_under_a_retry(tmp_path: Path, ray_cluster: None) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    names = broken_collection(images)
    tiny.run(str(images), str(out), SHARD)
    mend(images, names[1])
    mend(images, names[2])  # was good
    retry(out)
    with pytest.raises(PlanError, match="the input has changed"):
        tiny.run(str(images), str(out), SHARD)
    assert len(paths(LocalStore(out))) == 7
    assert LocalStore(out).exists(RETRY), "put the good one back and the retry must go on"


def test_a_reader_has_the_last_result_or_the_next_and_never_a_mix(tmp_path: Path, ray_cluster: None) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    names = broken_collection(images)
    tiny.run(str(images), str(out), SHARD)
    seen: set[int] = set()
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(len(paths(LocalStore(out))))
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for name in (names[1], names[4], names[8]):
        mend(images, name)
        retry(out)
        tiny.run(str(images), str(out), SHARD)
    stop.set()
    reader.join()
    assert not failures
    assert {7, 10} <= seen | {len(paths(LocalStore(out)))} and seen <= {7, 8, 9, 10}


class KilledError(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def test_a_retry_killed_before_any_of_its_writes_goes_on(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out, backup = tmp_path / "images", tmp_path / "out", tmp_path / "backup"
    names = broken_collection(images)
    tiny.run(str(images), str(out), SHARD)
    shutil.copytree(out, backup)
    mend(images, names[1])
    mend(images, names[4])
    left = 0

    def killing(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return call(*args, **kwargs)

        return counted

    for at in range(100):
        shutil.rmtree(out)
        shutil.copytree(backup, out)
        left = at
        with monkeypatch.context() as patch:
            for write in ("create", "delete", "sweep"):
                patch.setattr(LocalStore, write, killing(getattr(LocalStore, write)))
            try:
                retry(out)
                tiny.run(str(images), str(out), SHARD)
            except KilledError:
                pass
        if left >= 0:
            break
        if at == 0:
            retry(out)  # nothing had been noted
        assert len(paths(LocalStore(out))) in (7, 9)
        report: Any = tiny.run(str(images), str(out), SHARD)
        assert report["ledger"]["written"] == 9, at
        assert report["ledger"]["dead_by_reason"] == {"missing": 1}, at
        assert len(paths(LocalStore(out))) == 9, at
    assert at > 10, "fewer writes than there are"


def test_a_row_that_was_listed_twice_keeps_its_count(tmp_path: Path, ray_cluster: None) -> None:
    names = tiny.pictures(tmp_path, 4)
    pq.write_table(
        pa.table({"path": [names[0], names[3], names[1], names[3], names[2]]}), tmp_path / "rows.parquet"
    )
    (tmp_path / names[3]).unlink()
    report: Any = tiny.run(str(tmp_path / "rows.parquet"), str(tmp_path / "out"), SHARD)
    assert (report["ledger"]["dead_lettered"], report["ledger"]["duplicates"]) == (1, 1)
    mend(tmp_path, names[3])
    retry(tmp_path / "out")
    report = tiny.run(str(tmp_path / "rows.parquet"), str(tmp_path / "out"), SHARD)
    assert report["ledger"]["written"] == 4 and report["ledger"]["duplicates"] == 1
    assert paths(LocalStore(tmp_path / "out")) == sorted(names)


def test_a_reason_that_cannot_pass_is_tried_again_when_it_is_named(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    broken_collection(images)
    tiny.run(str(images), str(out), SHARD)
    retry(out, "truncated")
    said = capsys.readouterr().out
    assert "tried again: 1 truncated; shards to do: 1" in said
    assert "tried again if their input has changed: 1 missing, 1 unreadable" in said
    report: Any = tiny.run(str(images), str(out), SHARD)
    assert report["shards_resumed"] == 4 and report["ledger"]["dead_by_reason"]["truncated"] == 1


def test_the_command_to_run_again_is_shown_less_its_secrets(tmp_path: Path, ray_cluster: None) -> None:
    from llmvis.events import command_line, last_command, without_secrets

    broken_collection(tmp_path / "images")
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"), SHARD)
    told = last_command(LocalStore(tmp_path / "out"))
    assert told is not None and "pytest" in told[0] and told[1] == os.getcwd()
    assert command_line()[0] == "python"
    assert without_secrets("s3://key:word@host/a?X-Sig=abc in t") == "s3://…@host/a?… in t"


@pytest.mark.parametrize(
    ("flags", "says"), [({}, "--dead"), ({"dead": True, "reason": ("rot",)}, "there is no such reason")]
)
def test_a_retry_that_says_too_little_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        RetryConfig(path="x", **flags)


def test_a_folder_without_a_job_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="no job with a plan"):
        retry(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
