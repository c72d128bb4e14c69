"""Peak memory of the driver at 5,000 and at 50,000 small pictures: it must not grow with the collection.

Runs `jobs.encode`'s engine with an encoder that costs nothing, each size in a process of
its own. `ratio` is the larger run's peak over the smaller one's.

    python -m benchmarks.driver_memory --json driver_memory.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import json, resource, sys
from tests import tiny
from llmvis.cluster.session import session
with session():
    report = tiny.run(sys.argv[1], sys.argv[2], shard_items=256)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak_bytes": peak, "written": report["ledger"]["written"]}))
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    small: int = 5_000
    """Pictures of the smaller run."""
    large: int = 50_000
    """Pictures of the larger run."""
    json: str | None = None
    """Write the figures there."""


def peak(count: int, folder: Path) -> int:
    from tests import tiny

    tiny.pictures(folder / "images", count)
    command = [sys.executable, "-c", RUN, str(folder / "images"), str(folder / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = json.loads([line for line in run.stdout.splitlines() if line.startswith("{")][-1])
    assert said["written"] == count
    found: int = said["peak_bytes"]
    return found


def main(config: Config) -> None:
    peaks = {}
    for count in (config.small, config.large):
        with tempfile.TemporaryDirectory() as folder:
            peaks[count] = peak(count, Path(folder))
        print(f"{count:,} pictures: driver peak {peaks[count] / 1e6:,.0f} MB", flush=True)
    figures = {"ratio": round(peaks[config.large] / peaks[config.small], 4), "peak_bytes": peaks}
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
