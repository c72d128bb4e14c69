"""Build a search index from encoded pictures; all it reads is what their manifest names."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from llmvis.clip_retrieval import ClipFolder, is_clip_folder
from llmvis.config import IndexConfig, parse
from llmvis.entry import entry
from llmvis.index import IndexInfo, build, read_info
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import describe_encoder
from llmvis.plan import refuse_foreign
from llmvis.schema import UserError
from llmvis.storage import open_store
from llmvis.summary import size


def run(config: IndexConfig) -> dict[str, Any]:
    """Builds the index; returns the report that is printed."""
    info, given, found, ledger = _given(config)
    rows, dim = given, info.model["dim"]
    if config.dry_run:
        print(
            f"index plan: {rows:,} × {dim} from {config.embeddings}, exact, fp16: about {size(2 * rows * dim)}"
        )
        return {}

    def tables() -> Iterator[pa.Table]:
        with tqdm(total=rows, desc="index", unit=" rows", mininterval=1) as bar:
            for table in found:
                yield table
                bar.update(table.num_rows)

    begun = time.perf_counter()
    out = open_store(config.out)
    with out.lock():
        out.clear_unfinished()
        refuse_foreign(out, {"CURRENT", "manifests", "shards"})
        before = read_info(config.out)["rows"] if config.add else 0
        built = build(out, info, tables(), add=config.add)
    new = built["rows"] - before
    rows = ledger["indexed"] if ledger else given
    if ledger and given != sum(ledger[name] for name in ("indexed", "not_finite", "zero")):
        raise AssertionError(f"{given} vectors given, {dict(ledger)} accounted for")
    if new != rows and not (config.add and 0 <= new < rows):
        raise AssertionError(f"{new} rows indexed of {rows}")
    count = sum(s[part]["bytes"] for s in built["shards"] for part in ("vectors", "metadata"))
    seconds = time.perf_counter() - begun
    report = {"job": "index", "version": built["version"], "rows": built["rows"], "new": new, "dim": dim}
    report |= {"bytes": count, "already_there": rows - new, **({"ledger": dict(ledger)} if ledger else {})}
    report |= {"wall_s": round(seconds, 3), "model": built["model"]["name"], "kind": built["kind"]}
    where = f"{size(count)} in {config.out} (version {built['version']})"
    added = f" ({new:,} new, {rows - new:,} there already)" if config.add else ""
    print(f"index: {built['rows']:,} vectors × {dim}{added}, exact, {where}, {seconds:.1f} s")
    if ledger:
        print(f"ledger: {', '.join(f'{name} {number:,}' for name, number in ledger.items())}")
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _given(config: IndexConfig) -> tuple[IndexInfo, int, Iterator[pa.Table], Counter[str]]:
    """What is to be indexed: what it is of, its number of vectors, the vectors, and the count of a foreign folder's."""
    if not is_clip_folder(config.embeddings):
        if config.model or config.image_root:
            raise UserError(
                "--model and --image-root are for a folder of clip-retrieval: an encode job knows its own"
            )
        encoded = open_store(config.embeddings)
        manifest = read_manifest(encoded, "encode")
        info = IndexInfo(model=manifest["model"], source=manifest["source"])
        return info, manifest["rows"], (read_data(encoded, file) for file in manifest["files"]), Counter()
    if config.model is None:
        raise UserError(
            f"{config.embeddings} is a folder of clip-retrieval, which does not say what made its vectors: "
            "name the model with --model, as jobs.encode takes it"
        )
    model = describe_encoder(config.model)
    folder = ClipFolder(config.embeddings, dim=model.dim, image_root=config.image_root)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dim": model.dim, "licence": model.licence}
    return IndexInfo(model=about, source=folder.source), folder.rows, folder.tables(), folder.ledger


def main() -> None:
    run(parse(IndexConfig, "python -m jobs.index"))


if __name__ == "__main__":
    entry(main)
