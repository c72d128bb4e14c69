"""Build a search index from encoded pictures; all it reads is what their manifest names."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from llmvis.config import IndexConfig, parse
from llmvis.entry import entry
from llmvis.index import IndexInfo, build, read_info
from llmvis.ledger import read_data, read_manifest
from llmvis.plan import refuse_foreign
from llmvis.storage import Store
from llmvis.summary import size


def run(config: IndexConfig) -> dict[str, Any]:
    """Builds the index; returns the report that is printed."""
    encoded = Store(config.embeddings)
    manifest = read_manifest(encoded, "encode")
    rows, dim = manifest["rows"], manifest["model"]["dim"]
    if config.dry_run:
        print(f"index plan: {rows:,} × {dim} from {encoded.root}, exact, fp16: about {size(2 * rows * dim)}")
        return {}

    def tables() -> Iterator[pa.Table]:
        with tqdm(total=rows, desc="index", unit=" rows", mininterval=1) as bar:
            for file in manifest["files"]:
                table = read_data(encoded, file)
                yield table
                bar.update(table.num_rows)

    begun = time.perf_counter()
    out = Store(config.out)
    with out.lock():
        refuse_foreign(out, {"CURRENT", "manifests", "shards"})
        before = read_info(config.out)["rows"] if config.add else 0
        info = IndexInfo(model=manifest["model"], source=manifest["source"])
        built = build(out, info, tables(), add=config.add)
    new = built["rows"] - before
    if new != rows and not (config.add and 0 <= new < rows):
        raise AssertionError(f"{new} rows indexed of {rows}")
    count = sum(s[part]["bytes"] for s in built["shards"] for part in ("vectors", "metadata"))
    seconds = time.perf_counter() - begun
    report = {"job": "index", "version": built["version"], "rows": built["rows"], "new": new, "dim": dim}
    report |= {"bytes": count, "already_there": rows - new}
    report |= {"wall_s": round(seconds, 3), "model": built["model"]["name"], "kind": built["kind"]}
    where = f"{size(count)} in {config.out} (version {built['version']})"
    added = f" ({new:,} new, {rows - new:,} there already)" if config.add else ""
    print(f"index: {built['rows']:,} vectors × {dim}{added}, exact, {where}, {seconds:.1f} s")
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    run(parse(IndexConfig, "python -m jobs.index"))


if __name__ == "__main__":
    entry(main)
