"""Build a search index from encoded pictures; all it reads is what their manifest names."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
from tqdm import tqdm

from llmvis.clip_retrieval import ClipFolder, is_clip_folder
from llmvis.config import IndexConfig, parse
from llmvis.entry import entry
from llmvis.folders import files_of_manifest
from llmvis.index import IndexInfo, IndexPlan, build, plan_index, plan_kind, read_info
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.plan import refuse_foreign
from llmvis.report import draw_recall
from llmvis.schema import UserError
from llmvis.storage import open_store
from llmvis.summary import size


def run(config: IndexConfig) -> dict[str, Any]:
    """Builds the index; returns the report that is printed."""
    info, given, found, ledger = _given(config)
    plan = _plan(config, given, int(info.model["dim"]))
    if config.dry_run:
        print(*_plan_lines(plan, config.embeddings), sep="\n")
        return {}

    def tables() -> Iterator[pa.Table]:
        with tqdm(total=given, desc="index", unit=" rows", mininterval=1) as bar:
            for table in found:
                yield table
                bar.update(table.num_rows)

    begun = time.perf_counter()
    out = open_store(config.out)
    with out.lock():
        refuse_foreign(out, {"CURRENT", "manifests", "shards"})
        before = read_info(config.out)["rows"] if config.add else None
        built = build(
            out, info, tables(), plan=plan, add=config.add, encode_texts=_Texts(info, config.model), say=_say
        )
    report = _report(built, before, given, ledger)
    report["wall_s"] = round(time.perf_counter() - begun, 3)
    print(*_report_lines(report, config), sep="\n")
    if config.plot:
        if built["kind"] == "flat":
            print("note: an exact index has no curve to --plot", file=sys.stderr)
        else:
            draw_recall(built["tuned"], Path(config.plot))
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _plan(config: IndexConfig, rows: int, dim: int) -> IndexPlan:
    """What is to be built. Raises `UserError` where it cannot be, or is of another kind than is added to."""
    memory = int((config.memory or psutil.virtual_memory().total / 2e9) * 1e9)
    if not config.add:
        kind = None if config.kind == "auto" else config.kind
        return plan_index(rows, dim, memory_bytes=memory, recall=config.recall, kind=kind)
    old = read_info(config.out)
    if config.kind not in ("auto", old["kind"]):
        raise UserError(
            f"{config.out} is {old['kind']}; what is added to keeps its kind: leave --kind out, or build anew"
        )
    recall = old["tuned"]["target"] if "tuned" in old else 1.0
    return plan_kind(old["kind"], old["rows"] + rows, dim, recall, "the kind of the index that is added to")


def _plan_lines(plan: IndexPlan, embeddings: str) -> list[str]:
    kind = "exact" if plan.kind == "flat" else f"{plan.kind}, {plan.lists:,} lists, recall {plan.recall:g}"
    shards = -(-plan.rows // plan.shard_rows)
    return [
        f"index plan: {plan.rows:,} × {plan.dim} from {embeddings}",
        f"  kind       {kind}: {plan.why}",
        f"  memory     {size(plan.memory_bytes)} to search, {size(plan.build_bytes)} to build",
        f"  disk       about {size(plan.disk_bytes)} in {shards:,} shards",
        f"  time       about {plan.build_core_s:,.0f} s of one core, to train on {plan.train_rows:,} and to fill lists",
    ][: 4 if plan.kind == "flat" else 5]


class _Texts:
    """Captions → vectors, by the index's own model, which is loaded when it is first asked for."""

    def __init__(self, info: IndexInfo, name: str | None) -> None:
        self._model, self._name = info.model, name or info.model["name"]

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32] | None:
        """None, with a note, where the model is not here or not the one that made the vectors."""
        try:
            encoder = load_encoder(self._name)
        except (UserError, OSError) as error:
            _say(f"note: captions are not used to tune: {error}")
            return None
        if encoder.info.fingerprint != self._model["fingerprint"]:
            _say(f"note: captions are not used to tune: {self._name} is not what made the vectors")
            return None
        return np.concatenate([encoder.encode_texts(texts[at : at + 64]) for at in range(0, len(texts), 64)])


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _report(built: dict[str, Any], before: int | None, given: int, ledger: Counter[str]) -> dict[str, Any]:
    """What was done, to an index of `before` rows or to a new one. Rows unaccounted for are an error of ours."""
    new = built["rows"] - (before or 0)
    rows = ledger["indexed"] if ledger else given
    if ledger and given != sum(ledger[name] for name in ("indexed", "not_finite", "zero")):
        raise AssertionError(f"{given} vectors given, {dict(ledger)} accounted for")
    if new != rows and (before is None or not 0 <= new < rows):
        raise AssertionError(f"{new} rows indexed of {rows}")
    tuned = {name: value for name, value in built.get("tuned", {}).items() if name != "curve"}
    return {
        "job": "index", "version": built["version"], "rows": built["rows"], "new": new,
        "dim": built["model"]["dim"], "bytes": sum(f["bytes"] for f in files_of_manifest(built).values()),
        "already_there": rows - new, **({"ledger": dict(ledger)} if ledger else {}),
        "model": built["model"]["name"], "kind": built["kind"], **({"tuned": tuned} if tuned else {}),
    }  # fmt: skip


def _report_lines(report: dict[str, Any], config: IndexConfig) -> list[str]:
    kind = "exact" if report["kind"] == "flat" else report["kind"]
    added = f" ({report['new']:,} new, {report['already_there']:,} there already)" if config.add else ""
    where = f"{size(report['bytes'])} in {config.out} (version {report['version']}), {report['wall_s']:.1f} s"
    lines = [f"index: {report['rows']:,} vectors × {report['dim']}{added}, {kind}, {where}"]
    if tuned := report.get("tuned"):
        lines.append(
            f"recall@10 {tuned['recall_at_10']:.3f} on {tuned['queries']:,} {tuned['queries_are']}: "
            f"{tuned['nprobe']:,} lists probed, {tuned['candidates']:,} candidates reranked"
        )
        if tuned["recall_at_10"] < tuned["target"]:
            lines.append(
                f"warning: {tuned['target']:g} was asked for and no setting reaches it: --kind ivf_sq8 keeps more "
                "of each vector, --kind flat is exact"
            )
    if "ledger" in report:
        counts = (f"{name} {number:,}" for name, number in report["ledger"].items())
        lines.append(f"ledger: {', '.join(counts)}")
    return lines


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
