"""A head node with token authentication, started and stopped by a test, and jobs submitted to it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from s3_server import free_port

ROOT = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head: its ports by name, a client's environment, the token, and all that Ray writes."""

    ports: dict[str, int]
    env: dict[str, str]
    token: str
    folder: Path
    log: Path

    def ask(self, port: str, path: str, data: bytes | None = None, token: str = "") -> tuple[int, bytes]:
        """Status and body of a request to one of its ports; no token unless given."""
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[port]}{path}", data=data, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


@contextmanager
def started(extra: Mapping[str, str] | None = None) -> Iterator[Head]:
    """A head of two CPUs with `extra` in its environment, ready to take jobs."""
    folder = Path(tempfile.mkdtemp(prefix="llmvis-"))  # short: sockets lie in it
    token = secrets.token_hex(32)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | dict(extra or {})
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    ports = {name: free_port() for name in ("gcs", "dashboard", "agent", "client", "metrics")}
    start = [*RAY, "start", "--head", "--block", f"--port={ports['gcs']}", "--num-cpus=2",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}",
             f"--dashboard-agent-listen-port={ports['agent']}", f"--ray-client-server-port={ports['client']}",
             f"--metrics-export-port={ports['metrics']}", f"--temp-dir={folder / 'ray'}"]  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(start, env=env, stdout=file, stderr=subprocess.STDOUT)
    client = env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}"}
    head = Head(ports=ports, env=client, token=token, folder=folder, log=log)
    try:
        until = time.monotonic() + 90
        for port, path in (("dashboard", "/api/version"), ("agent", "/api/local_raylet_healthz")):
            while not _answers(head, port, path):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield head
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()  # a graceful stop takes half a minute
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(head: Head, port: str, path: str) -> bool:
    try:
        return head.ask(port, path)[0] in (200, 401)
    except OSError:
        return False


def submit(head: Head, *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit … -- python -m command`, as documented."""
    line = [*RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", *command]
    until = time.monotonic() + 60
    while True:
        run = subprocess.run(line, cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=300)
        if "No available agent" not in run.stderr or time.monotonic() > until:
            return run
        time.sleep(1)  # the head answers before its agent does
