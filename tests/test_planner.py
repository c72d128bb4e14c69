"""Plans by hand-computed numbers; what cannot be had is refused with the nearest that can."""

from __future__ import annotations

import pytest

from llmvis.index import IndexPlanError, plan_index, plan_kind
from llmvis.index.planner import list_count

GB = 10**9


def test_memory_of_each_kind_is_what_its_bytes_add_up_to() -> None:
    flat, sq8, rabitq = (plan_kind(k, 1_000_000, 512, 0.97) for k in ("flat", "ivf_sq8", "ivf_rabitq"))
    assert (flat.lists, flat.memory_bytes, flat.train_rows) == (0, 0, 0)
    assert sq8.lists == 4096 and sq8.train_rows == 40 * 4096
    assert sq8.memory_bytes == 520 * 1_000_000 + 4 * 512 * 4096
    assert rabitq.memory_bytes == 80 * 1_000_000 + 4 * 512 * 4096 + 4 * 512 * 512
    assert flat.disk_bytes == 1124 * 1_000_000
    assert sq8.disk_bytes == (1124 + 520) * 1_000_000 + 4 * 512 * 4096
    assert sq8.build_bytes == 4 * 512 * 40 * 4096 + 4 * 512 * 4096, "the sample is the most of it"
    assert (sq8.factory, rabitq.factory, flat.factory) == ("IVF4096,SQ8", "RR512,IVF4096,RaBitQ", "")


@pytest.mark.parametrize(
    ("rows", "lists"),
    [(0, 1), (1, 1), (77, 1), (78, 2), (1898, 32), (100_000, 1024), (1_000_000, 4096), (10**9, 131_072)],
)
def test_lists_are_a_power_of_two_that_leaves_enough_vectors_to_each(rows: int, lists: int) -> None:
    assert list_count(rows) == lists
    assert lists == 1 or rows / lists >= 39


def test_many_lists_are_found_by_a_graph_and_shards_stay_few() -> None:
    plan = plan_kind("ivf_rabitq", 10**9, 768, 0.95)
    assert plan.factory == "RR768,IVF131072_HNSW32,RaBitQ"
    assert plan.shard_rows == 10**9 // 64
    assert plan_kind("flat", 10, 768, 0.95).shard_rows == 262_144


def test_the_kind_follows_rows_recall_and_memory() -> None:
    def kind(rows: int, memory: float, recall: float = 0.97) -> str:
        return plan_index(rows, 512, memory_bytes=int(memory * GB), recall=recall).kind

    assert kind(200_000, 0.001) == "flat"
    assert kind(200_001, 8) == "ivf_sq8"
    assert kind(10_000_000, 6) == "ivf_sq8"
    assert kind(10_000_000, 5) == "ivf_rabitq"
    assert kind(10_000_000, 5, recall=1) == "flat"
    assert plan_index(50, 512, memory_bytes=GB, kind="ivf_sq8").kind == "ivf_sq8"


def test_what_cannot_be_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(
        IndexPlanError, match=r"need 8\.\d GB .* --memory is 4\.0 GB.* --memory 8\.\d, or about \d+,"
    ):
        plan_index(100_000_000, 512, memory_bytes=4 * GB)
    with pytest.raises(IndexPlanError, match=r"--memory 0\.2, or about .* or --kind flat"):
        plan_index(300_000, 512, memory_bytes=10**6, kind="ivf_sq8")
    with pytest.raises(IndexPlanError, match="--kind flat"):
        plan_index(300_000, 512, memory_bytes=GB, kind="ivf_sq8", recall=1)
    with pytest.raises(IndexPlanError, match="nothing to train"):
        plan_index(0, 512, memory_bytes=GB, kind="ivf_rabitq")
    with pytest.raises(IndexPlanError, match="more than 0"):
        plan_index(10, 512, memory_bytes=GB, recall=0)
