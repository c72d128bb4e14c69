"""A disk that is full: a small file system of its own where that may be mounted.

It knows of jobs only how to run them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import judge
import small_jobs

from llmvis.schema import UserError


def may_mount() -> bool:
    """Whether this process may mount a file system, tried out in a namespace of its own."""
    if os.geteuid() != 0:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Disk:
    """A file system of a few kilobytes at `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.place)], check=True)


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Disk]:
    """Mounts it for the length of the block."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def every_size(folder: Path, step: int = 8) -> tuple[int, int, list[str]]:
    """An encode job without Ray on disks of 4, 4 + `step`, … kilobytes, each enlarged after the job failed.

    Returns how many were too small, how many sufficed, and what was wrong, in words.
    """
    work, failed, done, wrong = folder / "work", 0, 0, list[str]()
    small_jobs.prepare_work(work)
    small_jobs.run_calmly("encode", work, work / "calm")
    for size in range(4, 260, step):
        with small_disk(folder / f"disk-{size}", size) as small, small_jobs.without_ray():
            out = small.place / "out"
            try:
                small_jobs.run_engine_job("encode", work, out)
                done += 1
            except UserError as error:
                failed += 1
                if "No space left" not in str(error):
                    wrong.append(f"{size} kB: {error}")
            except Exception as error:  # noqa: BLE001  whatever else it is, it has no words for people
                wrong.append(f"{size} kB: {error!r}")
            small.resize(10_000)
            small_jobs.run_engine_job("encode", work, out)
            verdict = judge.judge_job(out, work / "calm")
            if not verdict.good:
                wrong.append(f"{size} kB: {verdict}")
    return failed, done, wrong
