"""The whole of the chaos tests: `make chaos`, or `python tests/chaos/run.py --seed 7 --only index`.

Prints a table of job × victim × point, and what of the rest there is to say; exit status 1 where anything was
lost, duplicated, unreadable or different, or where a fault that was laid out did not fire.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import clocks  # noqa: E402
import disk  # noqa: E402
import kills  # noqa: E402
import nth  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

ENGINE, INDEX = 12, 28
"""Scenarios at `--scale 1`."""
CONSOLE = Console(width=120, highlight=False)


def table_of(outcomes: list[kills.Outcome]) -> Table:
    """One row for each job, victim and point; what a scenario suffered stands in the row of each of its faults."""
    wrongs = ("lost", "duplicated", "unreadable", "other")
    heads = ("job", "victim", "point", "kills", "fired", *wrongs, "reruns")
    sums: dict[tuple[str, str, str], list[int]] = {}
    for outcome in outcomes:
        fired = {fault["id"] for fault in outcome.fired}
        verdict = outcome.verdict
        for fault in outcome.scenario.faults:
            victim = "node" if fault["do"] == "kill node" else fault["role"]
            row = sums.setdefault((outcome.scenario.job, victim, fault["point"]), [0] * 7)
            wrong = (verdict.lost, verdict.duplicated, verdict.unreadable, len(verdict.other))
            # a driver's kill costs one run more, a worker's none
            reruns = int(fault["id"] in fired and fault["role"] == "driver")
            for place, value in enumerate((1, fault["id"] in fired, *wrong, reruns)):
                row[place] += value
    table = Table(*heads, title="kills")
    for key in sorted(sums):
        table.add_row(*key, *map(str, sums[key]))
    total = [sum(row[i] for row in sums.values()) for i in (0, 1)]
    whole = [sum(getattr(o.verdict, part) for o in outcomes) for part in ("lost", "duplicated", "unreadable")]
    other, reruns = sum(len(o.verdict.other) for o in outcomes), sum(o.reruns for o in outcomes)
    table.add_row("all", "", "", *map(str, (*total, *whole, other, reruns)), style="bold")
    return table


def run_kills(folder: Path, seed: int, scale: float, only: str) -> bool:
    """Jobs on Ray, then indexes."""
    laboratory, outcomes = kills.Laboratory(folder), list[kills.Outcome]()

    def each(scenarios: list[kills.Scenario], run: Callable[[kills.Scenario, Path], kills.Outcome]) -> None:
        for scenario in scenarios:
            out = folder / f"out-{len(outcomes)}"
            outcome = run(scenario, out)
            outcomes.append(outcome)
            fired = f"{len(outcome.fired)} of {len(scenario.faults)} fired"
            print(f"{scenario.job}: {fired}, {outcome.reruns} reruns, {outcome.seconds:.0f} s", flush=True)
            if outcome.good:
                shutil.rmtree(out)
            else:
                print(f"  WRONG in {out}: {outcome.verdict}\n  laid out: {scenario.faults}", flush=True)

    if only in ("all", "kills"):
        with laboratory.cluster():
            each(kills.engine_scenarios(seed, round(ENGINE * scale)), laboratory.run_engine)
    if only in ("all", "index"):
        laboratory.prepare_index()
        with laboratory.cluster():
            each(kills.index_scenarios(seed, round(INDEX * scale)), laboratory.run_index)
    CONSOLE.print(table_of(outcomes))
    return all(outcome.good for outcome in outcomes)


def run_calls(folder: Path) -> bool:
    """Each call to the file system, once and for ever."""
    table = Table("job", "fails", "calls", "made to fail", "wrong", title="the Nth call to the file system")
    good = True
    for subject in nth.subjects(folder):
        for for_ever in (False, True):
            found = nth.loop(subject, folder / f"runs-{for_ever}", for_ever=for_ever)
            fails = "from N on, ENOSPC" if for_ever else "once, EIO"
            table.add_row(found.job, fails, *map(str, (found.calls, found.tried, len(found.wrong))))
            good &= found.good and found.tried == found.calls
            print("\n".join(found.wrong), end="")
    CONSOLE.print(table)
    return good


def run_disk(folder: Path) -> bool:
    """Disks of every size that is too small."""
    if not disk.may_mount():
        print("disk full: left out, this process may not mount a file system")
        return True
    failed, done, wrong = disk.every_size(folder)
    print(
        f"disk full: {failed} sizes too small, each said so and went on with room; {done} sufficed; wrong: {wrong}"
    )
    return not wrong and failed > 0


def run_clocks(folder: Path) -> bool:
    """Clocks that go back, and files from the future."""
    wrong = clocks.trouble(folder)
    print(f"clock steps: {'; '.join(wrong) or 'reports and resumption are as without'}")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of scenarios")
    parser.add_argument("--only", choices=("all", "kills", "index", "calls", "disk", "clocks"), default="all")
    asked = parser.parse_args()
    begun = time.monotonic()
    parts = []
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    if asked.only in ("all", "kills", "index"):
        parts.append(run_kills(folder / "kills", asked.seed, asked.scale, asked.only))
    for part, run in (("calls", run_calls), ("disk", run_disk), ("clocks", run_clocks)):
        if asked.only in ("all", part):
            parts.append(run(folder / part))
    if all(parts):
        shutil.rmtree(folder)
    verdict = "all good" if all(parts) else "WRONG, see above"
    print(f"seed {asked.seed}: {verdict}, {time.monotonic() - begun:.0f} s")
    sys.exit(not all(parts))


if __name__ == "__main__":
    main()
