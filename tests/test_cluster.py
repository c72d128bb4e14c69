"""The cluster file is what Ray accepts, and jobs go through its job API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heads
import hf_models
import jsonschema
import pytest
import ray
import tiny
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
SCHEMA: dict[str, Any] = json.loads(
    (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()
)


def commands(kind: str) -> list[str]:
    """A kind of the cluster's commands, as one list."""
    found: list[str] = CONFIG.get(kind, [])
    return found


def test_cluster_yaml_is_valid_and_opens_nothing() -> None:
    jsonschema.validate(CONFIG, SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(CONFIG | {"max_worker": 3}, SCHEMA)  # the schema does look at names
    starts = [
        c for kind in ("head", "worker") for c in commands(f"{kind}_start_ray_commands") if "ray start" in c
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in c for c in starts)
    assert "~/.ray/auth_token" in CONFIG["file_mounts"], "every node has the token"
    assert "0.0.0.0" not in TEXT and "--dashboard-host=127.0.0.1" in starts[0]
    assert "security_group" not in CONFIG["provider"], "Ray's own lets in ssh only"


def test_the_cluster_has_a_head_without_work_and_scales_cpus_and_gpus() -> None:
    types = CONFIG["available_node_types"]
    head, workers = types[CONFIG["head_node_type"]], dict(types)
    workers.pop(CONFIG["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert {bool(t["resources"].get("GPU")) for t in workers.values()} == {True, False}
    assert all(t["max_workers"] > t["min_workers"] for t in workers.values())
    assert sum(t["max_workers"] for t in workers.values()) <= CONFIG["max_workers"]
    for name, kind in workers.items():
        spot = kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot == ("GPU" not in kind["resources"]), f"{name}: CPUs may go at any moment, GPUs are kept"


def test_nodes_reach_s3_by_a_role_and_no_key_is_written_down() -> None:
    for kind in CONFIG["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert not re.search(r"AKIA|aws_access_key|aws_secret|AWS_SECRET", TEXT, re.IGNORECASE)


def test_nodes_spill_to_a_disk_that_is_there_and_install_what_is_pinned() -> None:
    starts = commands("head_start_ray_commands") + commands("worker_start_ray_commands")
    (folder,) = set(re.findall(r"--object-spilling-directory=(\S+)", " ".join(starts)))
    setup = " ".join(commands("setup_commands"))
    assert f"mkdir -p {folder}" in setup
    sizes = [
        k["node_config"]["BlockDeviceMappings"][0]["Ebs"] for k in CONFIG["available_node_types"].values()
    ]
    assert all(disk["VolumeSize"] >= 100 and disk["DeleteOnTermination"] for disk in sizes)
    for target, source in CONFIG["file_mounts"].items():
        assert source.startswith("~") or (ROOT / source).is_file()
        assert target in setup or "token" in target, f"{target} is of no use"
    assert "pyproject.toml" in setup and "constraints.txt" in setup, "the project's own list of what it needs"


DOCUMENTS = ["README.md", "README.part.md", "cluster.yaml", "rayjob.yaml", "Dockerfile"]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if (ROOT / name).exists()])
def test_every_command_that_is_told_of_and_starts_or_asks_a_ray_has_the_token(name: str) -> None:
    text = (ROOT / name).read_text()
    parts = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL) if name.endswith(".md") else [text]
    found = 0
    for part in parts:
        for at in re.finditer(r"\bray (start|job \w+|up|dashboard|status)\b", part):
            line = part[part.rfind("\n", 0, at.start()) + 1 : at.start()]
            told = "export RAY_AUTH_MODE=token" in part[: at.start()] or "RAY_AUTH_MODE=token" in line
            assert told, at[0]
            found += 1
    assert found or name == "Dockerfile"


@pytest.fixture(scope="module")
def head() -> Iterator[heads.Head]:
    with heads.started() as running:
        yield running


def test_encode_index_and_search_as_submitted_jobs(head: heads.Head, tmp_path: Path) -> None:
    names = tiny.pictures(tmp_path / "images", 20)
    model = str(hf_models.save_clip(tmp_path / "clip"))
    images, enc, idx = str(tmp_path / "images"), str(tmp_path / "enc"), str(tmp_path / "idx")
    encoded = heads.submit(head, "jobs.encode", "--images", images, "--out", enc, "--model", model)
    assert encoded.returncode == 0, encoded.stdout + encoded.stderr
    assert "20 in = 20 written" in encoded.stdout
    indexed = heads.submit(head, "jobs.index", "--embeddings", enc, "--out", idx)
    assert indexed.returncode == 0, indexed.stdout + indexed.stderr
    found = heads.submit(head, "llmvis.cli", "search", "--index", idx, "flower", "-k", "20", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    assert set(re.findall(r"\d{5}\.png", found.stdout)) == set(names)
