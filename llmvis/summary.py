"""What a job did, as a dict for machines and as a few lines for people. Pure functions."""

from __future__ import annotations

from typing import Any

from llmvis.ledger import marker_name
from llmvis.plan import Plan
from llmvis.storage import Store

STAGES = ("list", "read", "decode", "model", "write")


def job_report(
    store: Store, plan: Plan, manifest: dict[str, Any], *, todo: list[int], list_s: float, wall_s: float
) -> dict[str, Any]:
    """The report of a run that did the shards `todo`.

    `seconds` are sums over all workers; `items_per_second` is the items of this run over
    the time from the beginning of its first shard to its last commit, without starting Ray
    and loading the model; `wall_s` has all of it.
    """
    markers = store.read_all_json([marker_name(shard) for shard in todo])
    seconds = {stage: sum(m["seconds"].get(stage, 0.0) for m in markers) for stage in STAGES}
    seconds["list"] = list_s
    items = sum(m["items"] for m in markers)
    span = max((m["ended"] for m in markers), default=0.0) - min((m["started"] for m in markers), default=0.0)
    return {
        "job": plan.job,
        "ledger": manifest["ledger"],
        "shards": plan.shards,
        "shards_resumed": plan.shards - len(todo),
        "items_this_run": items,
        "items_per_second": round(items / span, 2) if span > 0 else None,
        "wall_s": round(wall_s, 3),
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
        "bytes": sum(f["bytes"] for f in manifest["files"]),
    }


def report_lines(report: dict[str, Any], out: str) -> list[str]:
    """A report for a terminal."""
    ledger = report["ledger"]
    lines = [
        f"{report['job']}: {ledger['input']:,} in = {ledger['written']:,} written"
        f" + {ledger['dead_lettered']:,} dead letters + {ledger['duplicates']:,} duplicates"
    ]
    lines += [f"  {count:>8,} {reason}" for reason, count in ledger["dead_by_reason"].items()]
    if report.get("already_done"):
        return [*lines, f"nothing to do: {out} is finished and its input unchanged"]
    if report["shards_resumed"]:
        lines.append(f"went on from {report['shards_resumed']} of {report['shards']} shards done before")
    if report["items_per_second"]:
        unit = "queries" if report["job"] == "search" else "images"
        lines.append(f"{report['items_per_second']:,.1f} {unit}/s, {report['wall_s']:.1f} s in all")
    total = sum(report["seconds"].values()) or 1.0
    parts = [f"{stage} {value:.1f} s ({value / total:.0%})" for stage, value in report["seconds"].items()]
    lines.append("worker time: " + " · ".join(parts))
    lines.append(f"{size(report['bytes'])} in {out}")
    return lines


def size(count: float) -> str:
    """Bytes for people: 1,234,567 → 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def plan_lines(plan: Plan, notes: list[str], *, what: dict[str, str], row_bytes: int) -> list[str]:
    """A plan for a terminal; `row_bytes` is the estimate for one output row."""
    good = plan.items - plan.duplicates - plan.bad
    lines = [
        f"{plan.job} plan {plan.fingerprint[:12]}",
        f"  items      {plan.items:,}" + (f" ({size(plan.bytes)} listed)" if plan.bytes else ""),
        f"  to write   {good:,} rows at most, about {size(good * row_bytes)}",
    ]
    if plan.duplicates:
        lines.append(f"  duplicates {plan.duplicates:,}")
    if plan.bad:
        lines.append(f"  dead       {plan.bad:,} already known from the listing")
    lines.append(f"  shards     {plan.shards:,} of {plan.shard_items} items")
    lines += [f"  {key:<10} {value}" for key, value in what.items()]
    lines += [f"  note       {note}" for note in notes]
    return lines
