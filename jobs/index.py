"""Build a search index from encoded pictures, add to one, or compact one; all it reads is what manifests name."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmvis.cluster.checks import check_cluster
from llmvis.cluster.session import session
from llmvis.cluster.tasks import on_cluster
from llmvis.config import IndexConfig, parse
from llmvis.entry import entry
from llmvis.index import Each, build, compact, in_turn, read_info
from llmvis.indexing import Texts, given, plan_lines, planned, report, report_lines
from llmvis.plan import refuse_foreign
from llmvis.report import draw_recall
from llmvis.storage import open_store


def run(config: IndexConfig) -> dict[str, Any]:
    """Builds, adds or compacts; returns the report that is printed."""
    if config.compact:
        model = read_info(config.out)["model"]
        rows = read_info(config.out)["rows"]
    else:
        info, parts = given(config)
        model, rows = info.model, sum(part.rows for part in parts)
    plan = planned(config, rows, int(model["dim"]))
    if config.dry_run:
        print(*plan_lines(plan, config.embeddings or config.out), sep="\n")
        return {}
    begun = time.perf_counter()
    out, counts = open_store(config.out), Counter[str]()
    with out.lock(), ExitStack() as stack:
        refuse_foreign(out, {"CURRENT", "manifests", "shards"})
        each: Each = in_turn
        if os.environ.get("RAY_ADDRESS", "local") != "local" or plan.rows > plan.shard_rows:
            stack.enter_context(session(config.num_cpus))
            root = {"root": open_store(config.embeddings).uri} if config.embeddings else {}
            check_cluster(out.uri, root, actors=1, gpus_per_actor=0, actor_cpus=1, task_cpus=0)
            each = on_cluster
        before = read_info(config.out)["rows"] if config.add else 0
        common: dict[str, Any] = {
            "plan": plan, "encode_texts": Texts(model, config.model, _say), "each": _shown(each), "say": _say,
            "counts": counts,
        }  # fmt: skip
        if config.compact:
            built = compact(out, retrain=config.retrain, **common)
            rows = plan.rows
        else:
            built = build(out, info, parts, add=config.add, **common)
    found = report(built, before, rows, counts, config.out)
    found["wall_s"] = round(time.perf_counter() - begun, 3)
    print(*report_lines(found, config), sep="\n")
    if config.plot:
        if built["kind"] == "flat":
            print("note: an exact index has no curve to --plot", file=sys.stderr)
        else:
            draw_recall(built["tuned"], Path(config.plot))
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _shown(each: Each) -> Each:
    """The same, with a bar."""

    def shown(
        function: Callable[[Any], Any], items: Sequence[Any], *, what: str, alone: bool = False
    ) -> Iterator[tuple[int, Any]]:
        with tqdm(total=len(items), desc=what, mininterval=1, disable=not items) as bar:
            for found in each(function, items, what=what, alone=alone):
                bar.update()
                yield found

    return shown


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def main() -> None:
    run(parse(IndexConfig, "python -m jobs.index"))


if __name__ == "__main__":
    entry(main)
