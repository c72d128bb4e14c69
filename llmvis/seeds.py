"""The pictures that answer queries, copied out of an index's collections: what a loop of jobs begins from.

One table of made rows with the pictures as they are, and a manifest, so that every job takes it
for input. A picture that answers several queries is there once, under the first. For a few
thousand pictures; knows no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from llmvis.images import decode
from llmvis.index import open_index
from llmvis.ledger import parquet_bytes
from llmvis.made import MADE, made_schema
from llmvis.models.load import load_encoder
from llmvis.plan import refuse_foreign
from llmvis.schema import FORMAT_VERSION, ItemError
from llmvis.search import Hit, Query, pictures, query_vector, search
from llmvis.storage import open_store, sha256_bytes


def copy_seeds(index_path: str, queries: Sequence[str], k: int, out: str) -> dict[str, Any]:
    """The `k` best pictures of each query as `<out>/data/…`, with a manifest; returns that.

    Pictures that are gone or cannot be decoded are counted in the ledger and left out.
    """
    with open_index(index_path) as index:
        model = index.manifest["model"]
        encoder = load_encoder(model["name"])
        found: dict[str, tuple[str, Hit]] = {}
        for query in queries:
            (hits,) = search(index, query_vector(Query(text=query), encoder), k)
            for hit in hits:
                found.setdefault(hit.id, (query, hit))
        rows, lost = [], dict[str, int]()
        hits = [hit for _, hit in found.values()]
        for (query, hit), data in zip(found.values(), pictures(index, hits), strict=True):
            try:
                size = decode(data or b"")
            except ItemError as error:
                lost[str(error.reason)] = lost.get(str(error.reason), 0) + 1
                continue
            row = dict.fromkeys(MADE.names) | {"id": hit.id, "caption": hit.caption or query, "prompt": query}
            row |= {"image": {"bytes": data, "path": hit.path.rpartition("/")[2]}, "source": hit.path}
            row |= {"width": size.width, "height": size.height, "source_id": hit.id}
            rows.append(row | {"model": model["name"], "model_fingerprint": model["fingerprint"]})
    data = parquet_bytes(pa.Table.from_pylist(rows, made_schema([])))
    store = open_store(out)
    with store.lock():
        refuse_foreign(store, {"data", "manifest.json", "plan.json"})
        name = f"data/000000-{sha256_bytes(data)[:12]}.parquet"
        store.write(name, data)
        file = {"name": name, "rows": len(rows), "bytes": len(data), "sha256": sha256_bytes(data)}
        manifest: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "job": "seeds",
            "model": model,
            "source": {"index": index_path, "queries": list(queries), "k": k},
            "rows": len(rows),
            "files": [file] if rows else [],
            "ledger": {
                "input": len(found), "written": len(rows), "dead_lettered": sum(lost.values()), "duplicates": 0,
                "dead_by_reason": lost,
            },
        }  # fmt: skip
        store.write_json("plan.json", {"format": FORMAT_VERSION, "job": "seeds"})
        store.write_json("manifest.json", manifest)
        store.sweep("data", {name})
    return manifest
