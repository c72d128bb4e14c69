"""An index over embeddings: planned, built, opened and searched, exactly or by compressed vectors.

The only package that imports faiss.
"""

from __future__ import annotations

from llmvis.index.advice import advice, drift
from llmvis.index.build import build, compact
from llmvis.index.change import Deletion, delete
from llmvis.index.manifest import (
    SOURCE,
    IndexInfo,
    IndexMismatchError,
    QueryShapeError,
    manifest_hash,
    read_info,
)
from llmvis.index.opened import Index, open_index
from llmvis.index.parts import Each, Part, in_turn
from llmvis.index.planner import IndexPlan, IndexPlanError, plan_index, plan_kind
from llmvis.index.rows import Rows
from llmvis.index.where import WhereError

__all__ = [
    "SOURCE",
    "Deletion",
    "Each",
    "Index",
    "IndexInfo",
    "IndexMismatchError",
    "IndexPlan",
    "IndexPlanError",
    "Part",
    "QueryShapeError",
    "Rows",
    "WhereError",
    "advice",
    "build",
    "compact",
    "delete",
    "drift",
    "in_turn",
    "manifest_hash",
    "open_index",
    "plan_index",
    "plan_kind",
    "read_info",
]
