"""A small job, run once for each call that it makes to the file system, with that call failing.

After each failure nothing that a manifest names may be unreadable, and the same job, run again, must end as if
nothing had been.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import judge
import small_jobs
from calls import failing

from llmvis.index import open_index
from llmvis.schema import UserError


@dataclass(kw_only=True)
class Loop:
    """What came of it: how many calls the job makes, how many of them were made to fail, and what was wrong."""

    job: str
    for_ever: bool
    calls: int
    tried: int
    wrong: list[str]

    @property
    def good(self) -> bool:
        return not self.wrong and self.tried > 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A job to be run in `out`, which begins as a copy of `base` where there is one."""

    name: str
    run: Callable[[Path], object]
    judge: Callable[[Path], judge.Verdict]
    look: Callable[[Path], str | None]
    base: Path | None = None


def subjects(folder: Path) -> list[Subject]:
    """An encode job of two shards, and every change of an index."""
    work = folder / "work"
    small_jobs.prepare_work(work, small=True)
    few = work / "part"
    small_jobs.prepare_work(few, small=True)
    for number in range(8):
        (few / "images" / f"{number:05}.png").unlink()
    for place in (work, few):
        small_jobs.run_calmly("encode", place, place / "calm")
        (place / "new").symlink_to(place / "calm")

    def encode(out: Path) -> None:
        with small_jobs.without_ray():
            small_jobs.run_engine_job("encode", work, out)

    def look(out: Path) -> str | None:
        if not (out / "manifest.json").exists():
            return None
        verdict = judge.unreadable(out, judge.manifest_of(out))
        return f"unreadable: {verdict}" if verdict else None

    found = [
        Subject(name="encode", run=encode, judge=lambda out: judge.judge_job(out, work / "calm"), look=look)
    ]
    with _quiet():
        small_jobs.prepare_indexes(work)
        for job, told in small_jobs.INDEX_JOBS.items():
            base, calm = work / told.base, folder / f"calm-{job}"
            shutil.copytree(base, calm)
            small_jobs.run_index(job, work, calm)
            served = [set(judge.index_rows(place)) for place in (base, calm)]
            found.append(
                Subject(
                    name=job,
                    run=lambda out, job=job: small_jobs.run_index(job, work, out),  # type: ignore[misc]
                    judge=lambda out, calm=calm: judge.judge_index(out, calm),  # type: ignore[misc]
                    look=lambda out, served=served: _look_at_index(out, served),  # type: ignore[misc]
                    base=base,
                )
            )
    return found


def _look_at_index(out: Path, served: list[set[str]]) -> str | None:
    with open_index(str(out)) as index:
        ids = index.ids()
    return None if ids in served else f"{len(ids)} rows are served, which are no version's"


def loop(subject: Subject, folder: Path, *, for_ever: bool, step: int = 1, first: int = 1) -> Loop:
    """Fails call `first`, `first + step`, … until the job ends without having come to the call."""
    wrong: list[str] = []
    for tried in range(10**6):
        at = first + step * tried
        out = folder / f"{subject.name}-{at}"
        if subject.base is None:
            out.mkdir(parents=True)
        else:
            shutil.copytree(subject.base, out)
        error: Exception | None = None
        with failing(out, at, for_ever=for_ever) as calls, _quiet():
            try:
                subject.run(out)
            except Exception as caught:  # noqa: BLE001  which kind is judged below
                error = caught
        if not calls.fired:
            if error or len(calls.seen) >= at:
                wrong.append(f"no call failed, and yet: {error!r}")
            break
        what = f"call {at} ({calls.seen[at - 1]})"
        if error is not None and not isinstance(error, OSError | UserError):
            wrong.append(f"{what}: ends in {error!r}")
        try:
            fault = subject.look(out)
        except (OSError, ValueError, UserError) as caught:
            fault = f"what is published cannot be read: {caught!r}"
        if fault:
            wrong.append(f"{what}: {fault}")
        try:
            with _quiet():
                subject.run(out)
        except Exception as caught:  # noqa: BLE001  any is a fault
            wrong.append(f"{what}: the rerun ends in {caught!r}")
            continue
        verdict = subject.judge(out)
        if not verdict.good:
            wrong.append(f"{what}: {verdict}")
        shutil.rmtree(out)
    return Loop(job=subject.name, for_ever=for_ever, calls=len(calls.seen), tried=tried, wrong=wrong)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
