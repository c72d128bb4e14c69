"""What all tests share: one small Ray cluster for those that need one, and quiet threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import s3_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(  # Ray's workers import what the tests import
    [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, for the whole run; tests that need their own start a process."""
    from llmvis.cluster.session import session

    with session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(_server: s3_server.Server, monkeypatch: pytest.MonkeyPatch) -> s3_server.Server:
    """A real S3 server on loopback, which this process and those that it starts are told of."""
    for name, value in _server.env.items():
        monkeypatch.setenv(name, value)
    return _server
