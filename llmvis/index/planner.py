"""Which index to build: from rows, dimensions, memory and the recall that is wanted. Arithmetic only.

    flat         every vector is compared: exact; 2·D bytes a vector, memory-mapped
    ivf_sq8      lists around centroids, a byte a dimension, the best reranked by the fp16 vectors on disk
    ivf_rabitq   the same with a bit a dimension

Exact search is the default for as long as it is quick enough; HNSW is none: it cannot be merged from
shards, and is weakest on the queries that count here, texts among pictures. Knows no faiss and no files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmvis.schema import UserError

Kind = Literal["flat", "ivf_sq8", "ivf_rabitq"]
KINDS: tuple[Kind, ...] = ("flat", "ivf_sq8", "ivf_rabitq")

FLAT_ROWS = 200_000
"""To here a scan takes some 20 ms a query on one core, and building anything else longer than it saves."""
GRAPH_LISTS = 16_384
"""From so many lists on, centroids are found by a graph (HNSW) over them and not one by one."""
POINTS_A_LIST = 40
"""Training vectors for each centroid: more cost time and gain little (benchmarks/LOG.md)."""
KMEANS_ITERATIONS = 4
LEAST_POINTS_A_LIST = 39
"""Below it k-means makes poor centroids (faiss warns)."""
SHARD_ROWS, MOST_SHARDS = 262_144, 64
METADATA_BYTES = 100
"""Of a row, by experience: id, path, a short caption."""
FLOPS = 5e10
"""Of one core, float32, as a build uses it: for estimates of time only."""


class IndexPlanError(UserError):
    """An index that cannot be had as asked; the message says what can."""


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What will be built. `memory_bytes` is what searching keeps in memory, `disk_bytes` all files.

    `build_bytes`: the most that building keeps in memory, a shard's rows or the sample to train on.
    """

    kind: Kind
    rows: int
    dim: int
    lists: int
    train_rows: int
    shard_rows: int
    recall: float
    memory_bytes: int
    disk_bytes: int
    build_bytes: int
    build_core_s: float
    why: str

    @property
    def factory(self) -> str:
        """For `faiss.index_factory`; empty for an exact index."""
        coarse = f"IVF{self.lists}" + ("_HNSW32" if self.lists >= GRAPH_LISTS else "")
        return {"flat": "", "ivf_sq8": f"{coarse},SQ8", "ivf_rabitq": f"RR{self.dim},{coarse},RaBitQ"}[
            self.kind
        ]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "factory": self.factory}


def plan_index(
    rows: int, dim: int, *, memory_bytes: int, recall: float = 0.97, kind: Kind | None = None
) -> IndexPlan:
    """The index for `rows` vectors of `dim` dimensions that searches within `memory_bytes`.

    recall: recall@10 on text queries that is wanted; 1 means exact. kind: that one, whatever the rest says.

    Raises `IndexPlanError` where nothing fits, with the nearest that would.
    """
    if not 0 < recall <= 1:
        raise IndexPlanError(f"--recall is {recall}; it is a share: more than 0, at most 1")
    if kind is not None:
        return _checked(plan_kind(kind, rows, dim, recall), memory_bytes)
    if recall == 1:
        return plan_kind("flat", rows, dim, recall, "recall 1 is exact search")
    if rows <= FLAT_ROWS:
        return plan_kind("flat", rows, dim, recall, f"to {FLAT_ROWS:,} vectors exact search is quick enough")
    sq8 = plan_kind("ivf_sq8", rows, dim, recall, "a byte a dimension fits the memory")
    if sq8.memory_bytes <= memory_bytes:
        return sq8
    why = (
        f"a byte a dimension needs {_gb(sq8.memory_bytes)}, there are {_gb(memory_bytes)}: a bit a dimension"
    )
    return _checked(plan_kind("ivf_rabitq", rows, dim, recall, why), memory_bytes)


def plan_kind(kind: Kind, rows: int, dim: int, recall: float, why: str = "asked for") -> IndexPlan:
    """The index of this kind, be there memory for it or not. Raises `IndexPlanError` where it cannot be at all."""
    if kind != "flat" and rows < 1:
        raise IndexPlanError(f"there is nothing to train {kind} on: --kind flat takes an index of no rows")
    if kind != "flat" and recall == 1:
        raise IndexPlanError(
            f"--recall 1 is exact search, which {kind} is not: --kind flat, or --recall 0.99"
        )
    lists = 0 if kind == "flat" else list_count(rows)
    graph = 300 * lists if lists >= GRAPH_LISTS else 0  # links of 32 neighbours and levels
    coarse = 4 * dim * lists + graph
    code = {"flat": 0, "ivf_sq8": dim + 8, "ivf_rabitq": dim // 8 + 8 + 8}[kind]
    rotation = 4 * dim * dim if kind == "ivf_rabitq" else 0
    train = min(rows, POINTS_A_LIST * lists)
    shard_rows = max(SHARD_ROWS, -(-rows // MOST_SHARDS))
    compared = 2.0 * dim * (lists if lists < GRAPH_LISTS else 2_000)
    return IndexPlan(
        kind=kind, rows=rows, dim=dim, lists=lists, train_rows=train, recall=recall, why=why,
        shard_rows=shard_rows,
        memory_bytes=code * rows + coarse + rotation,
        disk_bytes=(2 * dim + METADATA_BYTES + code) * rows + coarse + rotation,
        build_bytes=max(
            (2 * dim + METADATA_BYTES) * min(rows, shard_rows), code * min(rows, shard_rows), 4 * dim * train
        ) + coarse,
        build_core_s=round((KMEANS_ITERATIONS * 2.0 * dim * lists * train + compared * rows) / FLOPS + rows * 4e-6, 1),
    )  # fmt: skip


def list_count(rows: int) -> int:
    """The power of two next to 4·√rows that leaves `LEAST_POINTS_A_LIST` vectors to each list; at least 1."""
    lists = 1
    while 2 * lists <= 4 * rows**0.5 * 2**0.5 and 2 * lists * LEAST_POINTS_A_LIST <= rows:
        lists *= 2
    return lists


def _checked(plan: IndexPlan, memory_bytes: int) -> IndexPlan:
    if plan.memory_bytes <= memory_bytes:
        return plan
    a_row = plan.memory_bytes / plan.rows
    raise IndexPlanError(
        f"{plan.rows:,} vectors of {plan.dim} dimensions as {plan.kind} need {_gb(plan.memory_bytes)} of memory to be "
        f"searched, and --memory is {_gb(memory_bytes)}. The nearest that can be had: --memory "
        f"{plan.memory_bytes / 1e9:.1f}, or about {int(memory_bytes / a_row):,} vectors; or --kind flat, which is "
        "memory-mapped and slow"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
