"""An index over embeddings: planned, built, opened and searched, exactly or by compressed vectors.

The only package that imports faiss.
"""

from __future__ import annotations

from llmvis.index.build import build
from llmvis.index.manifest import SOURCE, IndexInfo, IndexMismatchError, QueryShapeError, read_info
from llmvis.index.opened import Index, open_index
from llmvis.index.planner import IndexPlan, IndexPlanError, plan_index, plan_kind
from llmvis.index.where import WhereError

__all__ = [
    "SOURCE",
    "Index",
    "IndexInfo",
    "IndexMismatchError",
    "IndexPlan",
    "IndexPlanError",
    "QueryShapeError",
    "WhereError",
    "build",
    "open_index",
    "plan_index",
    "plan_kind",
    "read_info",
]
