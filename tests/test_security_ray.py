"""A real Ray with token authentication: who has no token gets nothing, and no secret lands in a file."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import heads
import hf_models
import pytest
import tiny

CANARIES = {
    name: f"canary{secrets.token_hex(16)}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
}


@pytest.fixture(scope="module")
def head() -> Iterator[heads.Head]:
    with heads.started(CANARIES) as running:
        yield running


def order(marker: Path) -> bytes:
    return json.dumps({"entrypoint": f"touch {marker}"}).encode()


@pytest.mark.parametrize(("port", "path"), [("dashboard", "/api/jobs/"), ("agent", "/api/job_agent/jobs/")])
@pytest.mark.parametrize("token", ["", "0" * 64])
def test_a_submission_without_the_token_is_refused(
    head: heads.Head, tmp_path: Path, port: str, path: str, token: str
) -> None:
    status, _ = head.ask(port, path, order(tmp_path / "ran"), token)
    assert status in (401, 403)
    assert head.ask(port, path, token=head.token)[0] != status, "with the token the same port answers"
    assert not (tmp_path / "ran").exists()


OPEN = {
    "dashboard": ["/", "/api/gcs_healthz", "/api/authentication_mode"],
    "agent": ["/api/local_raylet_healthz"],
    "metrics": ["/metrics"],
}
CLOSED = {
    "dashboard": [
        *("/api/version", "/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/logical/actors"),
        *("/api/v0/logs", "/api/v0/tasks", "/metrics", "/worker/traceback?pid=1", "/timezone"),
    ],
    "agent": ["/", "/api/job_agent/jobs/", "/metrics"],
}


@pytest.mark.parametrize(("port", "path"), [(p, path) for p, paths in CLOSED.items() for path in paths])
def test_what_the_pages_know_is_for_holders_of_the_token(head: heads.Head, port: str, path: str) -> None:
    assert head.ask(port, path)[0] == 401


@pytest.mark.parametrize(("port", "path"), [(p, path) for p, paths in OPEN.items() for path in paths])
def test_what_answers_anybody_has_no_secret(head: heads.Head, port: str, path: str) -> None:
    """An empty page, three words on health and Prometheus figures: why these ports stay closed all the same."""
    status, body = head.ask(port, path)
    assert status == 200
    for secret in (head.token, *CANARIES.values()):
        assert secret.encode() not in body


CONNECT = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(ray.get(ray.put('inside')))"


@pytest.mark.parametrize("port", ["gcs", "client"])
def test_python_gets_in_with_the_token_and_not_without(head: heads.Head, port: str) -> None:
    address = f"{'ray://' if port == 'client' else ''}127.0.0.1:{head.ports[port]}"
    bare = {key: value for key, value in head.env.items() if not key.startswith("RAY_")}
    wrong = bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}

    def said(env: dict[str, str]) -> str:
        connect = [sys.executable, "-c", CONNECT, address]
        return subprocess.run(connect, env=env, capture_output=True, text=True, timeout=240).stdout

    assert any("inside" in said(head.env) for _ in range(3)), "thirty seconds are little on a busy machine"
    assert "inside" not in said(bare | {"RAY_AUTH_MODE": "disabled"})
    assert "inside" not in said(wrong)


LOCAL = """
import urllib.error, urllib.request, ray
from llmvis.cluster.session import session
with session(num_cpus=1, dashboard=True):
    url = ray._private.worker.global_worker.node.webui_url
    try:
        urllib.request.urlopen(f"http://{url}/api/version", timeout=30)
    except urllib.error.HTTPError as error:
        print("answer", error.code, url.split(":")[0])
"""


def test_a_ray_that_a_job_starts_on_this_machine_has_a_token_too(tmp_path: Path) -> None:
    """With nothing set up before: a new home, no token in it, no variable of Ray's."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", LOCAL], cwd=heads.ROOT, env=env | {"HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "answer 401 127.0.0.1" in run.stdout, run.stdout + run.stderr
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0, "for its owner only"


def holding(secret: str, folder: Path) -> list[str]:
    """Files below a folder with the secret in them."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and secret.encode() in file.read_bytes():
            found.append(str(file.relative_to(folder)))
    return found


def test_no_secret_of_the_environment_lands_in_a_file(head: heads.Head, tmp_path: Path) -> None:
    """A job that succeeds and one that fails; then all that Ray and the jobs wrote and printed is read."""
    tiny.pictures(tmp_path / "images", 20)
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    model = str(hf_models.save_clip(tmp_path / "clip"))
    folders = ["--images", f"{tmp_path}/images", "--out", f"{tmp_path}/out"]
    good = heads.submit(head, "jobs.encode", *folders, "--model", model, "--json", f"{tmp_path}/report.json")
    assert "21 in = 20 written + 1 dead letters" in good.stdout, good.stdout + good.stderr
    bad = heads.submit(head, "jobs.encode", "--images", f"{tmp_path}/none", "--out", f"{tmp_path}/out2")
    assert bad.returncode != 0
    (tmp_path / "said").write_text(good.stdout + good.stderr + bad.stdout + bad.stderr)
    told = head.ask("dashboard", "/api/jobs/", token=head.token)
    assert told[0] == 200 and b"jobs.encode" in told[1]
    (tmp_path / "told").write_bytes(told[1])
    logs = list((head.folder / "ray").rglob("*.log")) + list((head.folder / "ray").rglob("*.out"))
    assert len(logs) > 10 and any("job-driver" in log.name for log in logs), "these are Ray's logs"
    for name in ("plan.json", "manifest.json", "report.json"):
        assert (tmp_path / "out" / name).is_file()
    for name, secret in {**CANARIES, "RAY_AUTH_TOKEN": head.token}.items():
        assert not holding(secret, head.folder), name
        assert not holding(secret, tmp_path), name
    (head.folder / "ray" / "leak.log").write_text(f"HF_TOKEN={CANARIES['HF_TOKEN']}")
    assert holding(CANARIES["HF_TOKEN"], head.folder) == ["ray/leak.log"], "a leak would be found"
