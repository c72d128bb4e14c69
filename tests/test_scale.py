"""The arithmetic of scale on numbers worked out by hand, and the figures that are on record."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from benchmarks.scale import UNITS, Units, estimate, measure, model_share

ROUND = Units(
    decode_ms=1,
    encode_ms=9,
    row_bytes=2000,
    index_bytes=1600,
    plan_bytes=50,
    list_items_s=10_000,
    plan_memory_bytes=60,
    finish_shard_ms=1,
    finish_shard_memory_bytes=4000,
)


def test_a_hundred_million_pictures_worked_out_by_hand() -> None:
    found = estimate(ROUND, 100_000_000, node_cores=16, nodes=10)
    assert found.shards == 390_625
    assert found.decode_core_hours == pytest.approx(27.78, abs=0.01)  # 1e5 s
    assert found.encode_core_hours == pytest.approx(250)
    assert found.node_hours == pytest.approx(277.78 / 16, abs=0.01)
    assert found.days == pytest.approx(277.78 / 16 / 10 / 24, abs=1e-4)
    assert (found.rows_gb, found.index_gb, found.plan_gb) == (200, 160, 5)
    assert found.list_hours == pytest.approx(2.78, abs=0.01)
    assert found.driver_gb == pytest.approx(6)  # ids of the listing; the shards take 1.6
    assert found.finish_minutes == pytest.approx(6.51, abs=0.01)
    assert (found.lists, found.gets, found.puts) == (100_000, 100_000_000, 1_171_875)


def test_a_started_shard_and_page_count_whole() -> None:
    found = estimate(ROUND, 257)
    assert (found.shards, found.lists, found.puts) == (2, 1, 6)


def test_the_figures_on_record_are_of_these_units() -> None:
    told = json.loads(UNITS.read_text())
    assert set(told["units"]) == {field.name for field in fields(Units)}
    assert all(value > 0 for value in told["units"].values())
    assert told["ratio"] == round(model_share(Units(**told["units"])), 4)


def test_the_share_of_the_model_is_of_all_that_a_picture_takes() -> None:
    """9 ms of it, 1 to decode, 0.1 to list, 1 / 256 to count up."""
    assert model_share(ROUND) == pytest.approx(9 / (9 + 1 + 0.1 + 1 / 256))


HELPERS = {"bulk", "synthetic", "autofaiss_peer"}
BENCHMARKS = sorted(path.stem for path in UNITS.parent.glob("*.py") if path.stem not in HELPERS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_writes_a_ratio_where_it_is_told(name: str) -> None:
    """Most take minutes, so it is looked for where their figures are put together."""
    module = importlib.import_module(f"benchmarks.{name}")
    assert "json" in {field.name for field in fields(module.Config)}
    written = ast.parse(Path(inspect.getfile(module.Config)).read_text())
    keys = {
        key.value for node in ast.walk(written) if isinstance(node, ast.Dict)
        for key in node.keys if isinstance(key, ast.Constant)
    }  # fmt: skip
    assert "ratio" in keys


def test_units_are_measured(tmp_path: Path) -> None:
    """A real measurement: every figure within what no machine that runs this would leave."""
    units = measure(tmp_path)
    assert 768 * 2 < units.index_bytes < 2500 and 768 < units.row_bytes < 2500
    assert 0.1 < units.decode_ms < 100 and 1 < units.encode_ms < 1000
    assert 8 < units.plan_memory_bytes < 1000 and units.list_items_s > 500
    assert all(value > 0 for value in asdict(units).values())
