"""An index to be built, as `jobs.index` is told of it: what goes in, the plan, and the report.

    given(config)       → what the index is of, and the parts that go in
    planned(config, …)  → the plan, or why there can be none
    report(…)           → what was done; every row is accounted for

Knows encode jobs, clip-retrieval's folders and indexes; builds nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from llmvis.clip_retrieval import ClipFolder, is_clip_folder
from llmvis.config import IndexConfig
from llmvis.folders import files_of_manifest
from llmvis.index import IndexInfo, IndexPlan, Part, advice, drift, plan_index, plan_kind, read_info
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.schema import UserError
from llmvis.storage import open_store
from llmvis.summary import size


@dataclass(frozen=True, kw_only=True)
class EncodedFile:
    """A data file of the encode job in the folder `uri`, to be indexed."""

    uri: str
    file: dict[str, Any]
    source: dict[str, Any]

    @property
    def rows(self) -> int:
        return int(self.file["rows"])

    @property
    def key(self) -> str:
        return str(self.file["sha256"])

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Its rows, after its hash is checked."""
        yield read_data(open_store(self.uri), self.file).slice(start, stop - start)


def given(config: IndexConfig) -> tuple[IndexInfo, list[Part]]:
    """What is to be indexed: what it is of, and its parts. Raises `UserError` where flags do not fit."""
    assert config.embeddings is not None
    if not is_clip_folder(config.embeddings):
        if config.model or config.image_root:
            raise UserError(
                "--model and --image-root are for a folder of clip-retrieval: an encode job knows its own"
            )
        encoded = open_store(config.embeddings)  # its uri is absolute: tasks have other working folders
        manifest = read_manifest(encoded, "encode")
        source = manifest["source"]
        files = [EncodedFile(uri=encoded.uri, file=file, source=source) for file in manifest["files"]]
        return IndexInfo(model=manifest["model"], source=source), list(files)
    if config.model is None:
        raise UserError(
            f"{config.embeddings} is a folder of clip-retrieval, which does not say what made its vectors: "
            "name the model with --model, as jobs.encode takes it"
        )
    model = describe_encoder(config.model)
    folder = ClipFolder(config.embeddings, dim=model.dim, image_root=config.image_root)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dim": model.dim, "licence": model.licence}
    return IndexInfo(model=about, source=folder.source), list(folder.parts())


def planned(config: IndexConfig, rows: int, dim: int) -> IndexPlan:
    """What is to be built of `rows` new vectors, or of those of the index that is added to or compacted.

    Raises `UserError` where it cannot be, or is of another kind than is added to.
    """
    memory = int((config.memory or psutil.virtual_memory().total / 2e9) * 1e9)
    asked = None if config.kind == "auto" else config.kind
    if not config.add and not config.compact:
        return plan_index(rows, dim, memory_bytes=memory, recall=config.recall or 0.97, kind=asked)
    old = read_info(config.out)
    recall = config.recall or (old["tuned"]["target"] if "tuned" in old else 0.97)
    if config.compact:
        living = old["rows"] - old.get("deleted", {}).get("rows", 0)
        kind = (asked or old["kind"]) if living else "flat"  # nothing can be trained on nothing
        return plan_index(living, dim, memory_bytes=memory, recall=recall, kind=kind)
    if asked not in (None, old["kind"]):
        raise UserError(
            f"{config.out} is {old['kind']}; what is added to keeps its kind: leave --kind out, or change it "
            "afterwards with --compact --kind"
        )
    return plan_kind(old["kind"], old["rows"] + rows, dim, recall, "the kind of the index that is added to")


def plan_lines(plan: IndexPlan, what: str) -> list[str]:
    """The plan, for people; `what`: where the vectors come from."""
    kind = "exact" if plan.kind == "flat" else f"{plan.kind}, {plan.lists:,} lists, recall {plan.recall:g}"
    shards = -(-plan.rows // plan.shard_rows)
    return [
        f"index plan: {plan.rows:,} × {plan.dim} from {what}",
        f"  kind       {kind}: {plan.why}",
        f"  memory     {size(plan.memory_bytes)} to search, {size(plan.build_bytes)} to build",
        f"  disk       about {size(plan.disk_bytes)} in {shards:,} shards",
        f"  time       about {plan.build_core_s:,.0f} s of one core, to train on {plan.train_rows:,} and to fill lists",
    ][: 4 if plan.kind == "flat" else 5]


class Texts:
    """Captions → vectors, by the index's own model, which is loaded when it is first asked for.

    `say` is told why where the model is not here or not the one that made the vectors: then there are none.
    """

    def __init__(self, model: dict[str, Any], name: str | None, say: Callable[[str], None]) -> None:
        self._model, self._name, self._say = model, name or model["name"], say

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32] | None:
        try:
            encoder = load_encoder(self._name)
        except (UserError, OSError) as error:
            self._say(f"note: captions are not used to tune: {error}")
            return None
        if encoder.info.fingerprint != self._model["fingerprint"]:
            self._say(f"note: captions are not used to tune: {self._name} is not what made the vectors")
            return None
        return np.concatenate([encoder.encode_texts(texts[at : at + 64]) for at in range(0, len(texts), 64)])


def report(
    built: dict[str, Any], before: int, given_rows: int, counts: Counter[str], uri: str
) -> dict[str, Any]:
    """What was done; `before`: rows that stayed as they were. Rows unaccounted for are an error of ours."""
    ledger = {
        "input": given_rows,
        "indexed": counts["indexed"],
        **{name: counts[name] for name in ("known", "not_finite", "zero", "made_unit_length")},
    }
    if given_rows != sum(counts[name] for name in ("indexed", "known", "not_finite", "zero")):
        raise AssertionError(f"{given_rows} vectors given, {dict(ledger)} accounted for")
    if built["rows"] != before + counts["indexed"]:
        raise AssertionError(f"{built['rows']} rows, of {before} and {counts['indexed']} new ones")
    tuned = {name: value for name, value in built.get("tuned", {}).items() if name != "curve"}
    dead = built.get("deleted", {}).get("rows", 0)
    found = {
        "job": "index", "version": built["version"], "rows": built["rows"] - dead, "new": counts["indexed"],
        "dim": built["model"]["dim"], "bytes": sum(f["bytes"] for f in files_of_manifest(built).values()),
        "already_there": counts["known"], "dead": dead, "ledger": ledger,
        "model": built["model"]["name"], "kind": built["kind"], "advice": advice(built, uri),
    }  # fmt: skip
    return found | ({"tuned": tuned} if tuned else {}) | ({"drift": told} if (told := drift(built)) else {})


def report_lines(found: dict[str, Any], config: IndexConfig) -> list[str]:
    """The report, for people."""
    kind = "exact" if found["kind"] == "flat" else found["kind"]
    added = f" ({found['new']:,} new, {found['already_there']:,} there already)" if config.add else ""
    where = f"{size(found['bytes'])} in {config.out} (version {found['version']}), {found['wall_s']:.1f} s"
    lines = [f"index: {found['rows']:,} vectors × {found['dim']}{added}, {kind}, {where}"]
    if tuned := found.get("tuned"):
        lines.append(
            f"recall@10 {tuned['recall_at_10']:.3f} on {tuned['queries']:,} {tuned['queries_are']}: "
            f"{tuned['nprobe']:,} lists probed, {tuned['candidates']:,} candidates reranked"
        )
        if tuned["recall_at_10"] < tuned["target"]:
            lines.append(
                f"warning: {tuned['target']:g} was asked for and no setting reaches it: --kind ivf_sq8 keeps more "
                "of each vector, --kind flat is exact"
            )
    left_out = [
        f"{name} {found['ledger'][name]:,}" for name in ("not_finite", "zero") if found["ledger"][name]
    ]
    if left_out or found["ledger"]["made_unit_length"]:
        counts = (f"{name} {number:,}" for name, number in found["ledger"].items())
        lines.append(f"ledger: {', '.join(counts)}")
    return lines + [f"advice: {line}" for line in found["advice"]]
