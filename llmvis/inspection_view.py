"""What `inspection` found, for people at a terminal. Draws a dict and reads no file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmvis.schema import printable
from llmvis.summary import size

MOST_PROBLEMS = 10
"""Problems shown of each part; the rest is counted. `--json` has all."""

_COLOURS = {"finished": "green", "running": "cyan", "retry": "yellow", "stopped": "yellow"}


def show(found: dict[str, Any], console: Console) -> None:
    """Prints what `inspection.inspect_folder` returned."""
    for part in found["parts"]:
        where = printable("/".join(word for word in (found["path"].rstrip("/"), part["name"]) if word))
        title = part.get("job") or ("index" if part["kind"] == "index" else "")
        colour = "red" if part["problems"] else _COLOURS.get(part["state"], "red")
        console.print(Text.assemble((where, "bold"), f"  {title}  ", (part["state"], colour)))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in (
            _index_lines(part) if "shards" in part else _job_lines(part) if "plan" in part else []
        ):
            table.add_row(f"  {name}", Text(printable(text)))
        console.print(table)
        _show_dead(part.get("dead", []), console)
        _show_problems(part["problems"], console)


def _job_lines(part: dict[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    plan, progress, ledger, files = part["plan"], part["progress"], part["ledger"], part["files"]
    if plan is not None:
        settings = ", ".join(f"{name} {str(value)[:16]}" for name, value in plan["parts"]["settings"].items())
        lines.append(("plan", f"{plan['fingerprint'][:12]} from {plan['parts']['source'].get('root')}"))
        lines.append(("settings", settings or "none"))
        listed = f" ({size(plan['bytes'])} listed)" if plan["bytes"] else ""
        lines.append(
            ("items", f"{plan['items']:,}{listed} in {plan['shards']:,} shards of {plan['shard_items']}")
        )
    if progress is not None:
        share = progress["items_done"] / max(plan["items"], 1)
        text = f"{progress['shards_done']:,} of {progress['shards']:,} shards ({share:.0%})"
        if progress["items_per_second"]:
            left = time.strftime("%H:%M:%S", time.gmtime(min(progress["seconds_left"], 86_399)))
            text += f", {progress['items_per_second']:,.1f} items/s, {left} left"
        lines.append(("done", text))
    lines.append(("driver", part["owner"] or "none at work"))
    balance = "balances" if ledger["balances"] else "DOES NOT BALANCE"
    words = "so far, " if ledger["so_far"] else "of the last result, " if part["state"] == "retry" else ""
    lines.append((
        "ledger",
        f"{ledger['input']:,} in = {ledger['written']:,} written + {ledger['dead_lettered']:,} dead letters"
        f" + {ledger['duplicates']:,} duplicates: {words}{balance}",
    ))  # fmt: skip
    lines.append(
        ("files", f"{files['data']:,} data, {files['dead']:,} dead, {size(files['bytes'])}{_checked(part)}")
    )
    lines += _stray(part)
    if total := sum(part["seconds"].values()):
        stages = [f"{stage} {value:,.1f} s ({value / total:.0%})" for stage, value in part["seconds"].items()]
        lines.append(("time", " · ".join(stages)))
    if part["state"] == "retry":
        lines.append(
            ("retry", "dead letters are put back: run the job's command again; readers have the last result")
        )
    return lines


def _index_lines(part: dict[str, Any]) -> list[tuple[str, str]]:
    model = part["model"]
    kept = ", ".join(map(str, part["kept"]))
    dead = ""
    if part["deleted"]:
        dead = f", {part['deleted']:,} of them deleted ({part['deleted'] / part['rows']:.0%})"
    lines = [
        ("version", f"{part['version']} (kept: {kept})"),
        ("rows", f"{part['rows']:,} × {model.get('dim')} in {len(part['shards']):,} shards{dead}"),
        ("model", f"{model.get('name')} {str(model.get('fingerprint'))[:12]} ({model.get('licence')})"),
        ("sources", ", ".join(part["sources"])),
        ("kind", _index_kind(part)),
    ]
    count = sum(len(shard["files"]) for shard in part["shards"])
    there = sum(file["there"] for shard in part["shards"] for file in shard["files"])
    lines.append(("files", f"{there:,} of {count:,} there, {size(part['files']['bytes'])}{_checked(part)}"))
    lines += [("advice", line) for line in part["advice"]]
    return lines + _stray(part)


def _index_kind(part: dict[str, Any]) -> str:
    tuned = part["tuned"]
    if tuned is None:
        return "exact"
    return (
        f"{part['index_kind']}, recall@10 {tuned['recall_at_10']:.3f} of {tuned['target']:g} asked for, on "
        f"{tuned['queries']:,} {tuned['queries_are']}, by {tuned['nprobe']:,} lists and "
        f"{tuned['candidates']:,} candidates"
    )


def _checked(part: dict[str, Any]) -> str:
    if not part["verified"]:
        return ""
    return ", sha256 of each checked" if not part["problems"] else ", sha256 checked"


def _stray(part: dict[str, Any]) -> list[tuple[str, str]]:
    count, held = part["files"]["unreferenced"], part["files"]["unreferenced_bytes"]
    if not count:
        return []
    what = "being written" if part["state"] == "running" else "llmvis gc removes them"
    return [("stray", f"{count:,} files that nothing names, {size(held)}: {what}")]


def _show_dead(dead: list[dict[str, Any]], console: Console) -> None:
    if not dead:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (
        ("  dead", "right"),
        ("reason", "left"),
        ("stage", "left"),
        ("source", "left"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold", header_style="dim")  # type: ignore[arg-type]
    for letters in dead:
        head = (f"{letters['count']:,}", letters["reason"])
        for example in letters["examples"] or [dict.fromkeys(("stage", "source", "detail"), "")]:
            table.add_row(*head, *(Text(example[key]) for key in ("stage", "source", "detail")))
            head = ("", "")
    console.print(table)


def _show_problems(problems: list[dict[str, Any]], console: Console) -> None:
    for problem in problems[:MOST_PROBLEMS]:
        console.print(Text.assemble(("  damaged  ", "red"), printable(problem["what"])))
        console.print(Text(f"           → {printable(problem['do'])}"))
    if (more := len(problems) - MOST_PROBLEMS) > 0:
        console.print(Text(f"           … and {more:,} more; --json has all"))
