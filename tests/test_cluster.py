"""The cluster file is what Ray accepts, and jobs go through its job API with a token and not without."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hf_models
import jsonschema
import psutil
import pytest
import ray
import tiny
import yaml

ROOT = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def test_cluster_yaml_is_valid_and_opens_nothing() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(t["resources"].get("GPU") for t in types.values())
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in c for c in commands if "ray start" in c)
    assert f"=={ray.__version__}" in text and "0.0.0.0" not in text


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node with token authentication, started and stopped here; gives the client's environment."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = [*RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(start, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        until = time.monotonic() + 90
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield env | {"RAY_API_SERVER_ADDRESS": address}
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()  # a graceful stop takes half a minute
        process.wait(timeout=60)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except OSError:
        return False
    return True


def submit(head: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    line = [*RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", *command]
    until = time.monotonic() + 60
    while True:
        run = subprocess.run(line, cwd=ROOT, env=head, capture_output=True, text=True, timeout=300)
        if "No available agent" not in run.stderr or time.monotonic() > until:
            return run
        time.sleep(1)  # the head answers before its agent does


def test_encode_index_and_search_as_submitted_jobs(head: dict[str, str], tmp_path: Path) -> None:
    names = tiny.pictures(tmp_path / "images", 20)
    model = str(hf_models.save_clip(tmp_path / "clip"))
    images, enc, idx = str(tmp_path / "images"), str(tmp_path / "enc"), str(tmp_path / "idx")
    encoded = submit(head, "jobs.encode", "--images", images, "--out", enc, "--model", model)
    assert encoded.returncode == 0, encoded.stdout + encoded.stderr
    assert "20 in = 20 written" in encoded.stdout
    indexed = submit(head, "jobs.index", "--embeddings", enc, "--out", idx)
    assert indexed.returncode == 0, indexed.stdout + indexed.stderr
    found = submit(head, "llmvis.cli", "search", "--index", idx, "flower", "-k", "20", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    assert set(re.findall(r"\d{5}\.png", found.stdout)) == set(names)


def test_an_anonymous_submission_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    request = urllib.request.Request(
        f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        data=json.dumps({"entrypoint": f"touch {marker}"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()
    assert refused.value.code == 401
    time.sleep(1)
    assert not marker.exists()
