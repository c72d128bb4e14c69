"""Clocks that are wrong: each look at the time is earlier than the last one, and files are from the future."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import judge
import small_jobs

from llmvis import ledger
from llmvis.cluster import stages
from llmvis.ledger import marker_name
from llmvis.summary import report_lines

FUTURE = time.time() + 10 * 365 * 86400
STEPS = {"back": -1000.0, "forth": 1e7, "back and forth": None}
"""Seconds from one look at the clock to the next."""


def trouble(folder: Path) -> list[str]:
    """What is wrong with an encode job of which a part is done under each of `STEPS` and redone, in words."""
    work, wrong = folder / "work", list[str]()
    small_jobs.prepare_work(work)
    for picture in sorted((work / "images").iterdir())[::3]:
        os.utime(picture, (FUTURE, FUTURE))
    small_jobs.run_calmly("encode", work, work / "calm")
    for name, step in STEPS.items():
        out = folder / name.replace(" ", "-")
        with clock(step), small_jobs.without_ray():
            small_jobs.run_engine_job("encode", work, out)
            for shard in (2, 5, 11):
                (out / marker_name(shard)).unlink()
            for file in out.rglob("*.*"):
                os.utime(file, (FUTURE, FUTURE))
            report = small_jobs.run_engine_job("encode", work, out)
        if report["shards_resumed"] != small_jobs.SHARDS["encode"] - 3:
            wrong.append(f"clock {name}: {report['shards_resumed']} shards were resumed")
        rate = report["items_per_second"]
        numbers = [report["wall_s"], *report["seconds"].values(), 0 if rate is None else rate]
        said = "\n".join(report_lines(report, str(out)))
        if min(numbers) < 0 or "-" in said.replace(str(out), ""):
            wrong.append(f"clock {name}: the report says {json.dumps(report)}")
        verdict = judge.judge_job(out, work / "calm")
        if not verdict.good:
            wrong.append(f"clock {name}: {verdict}")
    return wrong


@contextmanager
def clock(step: float | None) -> Iterator[None]:
    """Inside, the modules that stamp shards look at such a clock."""
    looks = itertools.count()

    def look() -> float:
        number = next(looks)
        return time.time() + (step * number if step is not None else 1e6 * (-1) ** number)

    stepped = SimpleNamespace(time=look, perf_counter=time.perf_counter)
    with mock.patch.object(ledger, "time", stepped), mock.patch.object(stages, "time", stepped):
        yield
