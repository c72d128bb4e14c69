"""A running job as machines see it: JSON lines of driver and workers, and Ray's metrics, scraped from a real node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import poison
import pytest
import ray
import tiny

from llmvis.cluster.jobs import Pool
from llmvis.events import Journal, log_event

TESTS = Path(__file__).parent


def lines(out: Path) -> list[dict[str, Any]]:
    """Every line that the job wrote, in the order of time."""
    found = [json.loads(line) for file in (out / "_logs").iterdir() for line in file.read_text().splitlines()]
    return sorted(found, key=lambda line: line["time"])


def test_every_line_says_whose_it_is_and_the_lines_add_up(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 20)
    (tmp_path / "images" / "00003.png").write_bytes(b"<html>")
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    found = lines(tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {(line["job"], line["fingerprint"]) for line in found} == {("encode", plan["fingerprint"])}
    assert len({line["run"] for line in found}) == 1 and all(line["host"] and line["pid"] for line in found)
    assert [found[0]["event"], found[-1]["event"]] == ["start", "end"] and found[0]["todo"] == 3
    begun = Counter((line["stage"], line["shard"]) for line in found if line["event"] == "begin")
    assert begun == {(stage, shard): 1 for stage in ("prepare", "model", "commit") for shard in range(3)}
    commits = [line for line in found if line["event"] == "commit"]
    assert sum(line["written"] for line in commits) == 19 and sum(line["dead"] for line in commits) == 1
    assert sum((Counter(line["reasons"]) for line in commits), Counter()) == {"not_an_image": 1}
    assert all(line["node"] for line in commits) and found[-1]["ledger"]["written"] == 19
    before = len(found)
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    assert len(lines(tmp_path / "out")) == before, "a finished job is left as it is"


def test_the_lines_tell_which_shard_killed_its_worker(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 24)
    faults = {"00017.png": "segfault"}
    poison.run(str(tmp_path / "images"), str(tmp_path / "out"), Pool(shard_items=8), prepare=faults, model={})
    found = lines(tmp_path / "out")
    tries = [line["attempt"] for line in found if line.get("shard") == 2 and line.get("stage") == "prepare"]
    assert sorted(tries) == [0, 1, 2], "two workers died over it, then it was done item by item"
    commits = {line["shard"]: line["reasons"] for line in found if line["event"] == "commit"}
    assert commits == {0: {}, 1: {}, 2: {"crashed": 1}} and found[-1]["event"] == "end"


def test_lines_go_to_stderr_or_nowhere_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"out": str(tmp_path), "job": "encode", "fingerprint": "f", "run": "r"}
    monkeypatch.setenv("LLMVIS_LOG", "stderr")
    log_event(run, "commit", shard=3)
    assert json.loads(capsys.readouterr().err)["shard"] == 3
    monkeypatch.setenv("LLMVIS_LOG", "off")
    log_event(run, "commit", shard=3)
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_stops_no_work(tmp_path: Path) -> None:
    (tmp_path / "_logs").write_text("a file where the folder should be")
    log_event({"out": str(tmp_path), "job": "encode", "fingerprint": "f", "run": "r"}, "commit")
    with Journal("s3://bucket/out"):
        log_event({"out": "s3://bucket/out", "job": "encode", "fingerprint": "f", "run": "r"}, "commit")


def scraped() -> dict[tuple[str, ...], float]:
    """`(name, values of our tags)` → value, summed over the workers, from each node's own endpoint."""
    found: Counter[tuple[str, ...]] = Counter()
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(where, timeout=10) as answer:
            text = answer.read().decode()
        for name, tags, value in re.findall(r"^(ray_llmvis_\w+){(.*)} (\S+)$", text, re.MULTILINE):
            ours = [
                v
                for k, v in re.findall(r'(\w+)="([^"]*)"', tags)
                if k in ("job", "outcome", "reason", "stage", "le")
            ]
            found[(name, *ours)] += float(value)
    return dict(found)


SCRAPE = """
import json, sys, time
import test_observe, tiny
from llmvis.cluster.session import session
with session(num_cpus=2):
    tiny.run(sys.argv[1], sys.argv[2])
    until = time.monotonic() + 90
    while time.monotonic() < until:
        found = test_observe.scraped()
        if found.get(("ray_llmvis_shards_committed_total", "encode")) == 3 and any("planned" in k[0] for k in found):
            break
        time.sleep(1)
    print(json.dumps([[*key, value] for key, value in found.items()]))
"""


def test_prometheus_finds_the_numbers_on_the_nodes_own_port(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 20)
    (tmp_path / "images" / "00003.png").write_bytes(b"<html>")
    run = subprocess.run(
        [sys.executable, "-c", SCRAPE, str(tmp_path / "images"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    last = [line for line in run.stdout.splitlines() if line.startswith("[[")][-1]
    found = {tuple(key): value for *key, value in json.loads(last)}
    assert found[("ray_llmvis_shards_committed_total", "encode")] == 3
    assert found[("ray_llmvis_items_total", "encode", "written")] == 19
    assert found[("ray_llmvis_items_total", "encode", "dead")] == 1
    assert found[("ray_llmvis_dead_letters_total", "encode", "not_an_image")] == 1
    assert found[("ray_llmvis_stage_tries_total", "encode", "prepare")] == 3
    assert found[("ray_llmvis_stage_seconds_total", "encode", "model")] > 0
    assert found[("ray_llmvis_shard_stage_seconds_count", "encode", "model")] == 3
    assert found[("ray_llmvis_shards_planned", "encode")] == found[("ray_llmvis_shards_to_do", "encode")] == 3
