"""What a job tells machines while it runs: JSON lines, each with the job, its plan and its run. No Ray.

By default the driver and each worker append to a file of their own, `<out>/_logs/<host>-<pid>.jsonl`, so
no two write into one, also on a shared disk. `LLMVIS_LOG=stderr` sends the lines to stderr instead,
where Ray keeps those of workers in its session's `logs/` for a collector; `LLMVIS_LOG=off` sends none.
An object store takes no appended lines: an `--out` there has logs on stderr or nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from llmvis.plan import Plan
from llmvis.storage import StorageError, Store, local_path

FOLDER = "_logs"
SETTING = "LLMVIS_LOG"

_SECRET_FLAG = re.compile(r"(?i)(token|secret|password|passwd|credential|api-?key)")
_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY = re.compile(r"(?<=://)(\S+?)\?\S+")


def log_event(run: dict[str, str], event: str, **fields: Any) -> None:
    """Writes one line. `run` has `out`, `job`, `fingerprint` and `run`: whose line it is."""
    where = os.environ.get(SETTING, "files")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        **{key: run[key] for key in ("job", "fingerprint", "run")},
        "host": os.uname().nodename,
        "pid": os.getpid(),
        **fields,
    }
    text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
    if where == "stderr":
        sys.stderr.write(text)
        sys.stderr.flush()
    elif where == "files":
        with contextlib.suppress(OSError, StorageError):  # work is not lost for want of a log
            _append(local_path(run["out"]) / FOLDER, text)


def _append(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{os.uname().nodename}-{os.getpid()}.jsonl").open("ab") as file:
        file.write(text.encode("utf-8", "backslashreplace"))


class Journal:
    """The driver's lines of one run: `start`, then `end` or, when the block is left by an error, `failed`."""

    def __init__(self, out: str) -> None:
        self._out, self._begun = out, time.perf_counter()
        self.run: dict[str, str] | None = None
        """What a line says whose it is; goes to the workers. None before `start`."""

    def __enter__(self) -> Journal:
        return self

    def start(self, plan: Plan, todo: int) -> dict[str, str]:
        """The run begins, with so many shards to do."""
        self.run = {
            "out": self._out, "job": plan.job, "fingerprint": plan.fingerprint, "run": uuid.uuid4().hex[:12],
        }  # fmt: skip
        log_event(
            self.run, "start", items=plan.items, shards=plan.shards, todo=todo,
            command=command_line(), cwd=str(Path.cwd()),
        )  # fmt: skip
        return self.run

    def end(self, report: dict[str, Any]) -> None:
        """All is published."""
        assert self.run is not None, "a run ends that was not started"
        log_event(
            self.run, "end", ledger=report["ledger"], wall_s=report["wall_s"], seconds=report["seconds"]
        )
        self.run = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.run is not None:
            wall = round(time.perf_counter() - self._begun, 3)
            log_event(
                self.run, "failed", error=kind.__name__, detail=without_secrets(str(error))[:500], wall_s=wall
            )


def command_line() -> list[str]:
    """How this process was started, less what may be a secret."""
    found = ["python", *sys.orig_argv[1:]]
    hide = False
    for place, word in enumerate(found):
        flag, mark, _ = word.partition("=")
        secret = word.startswith("--") and _SECRET_FLAG.search(flag) is not None
        found[place] = "…" if hide else f"{flag}=…" if secret and mark else without_secrets(word)
        hide = secret and not mark
    return found


def without_secrets(text: str) -> str:
    """`text` less users, passwords and queries in URIs."""
    return _QUERY.sub(r"\1?…", _USER.sub("…", text))


def last_command(store: Store) -> tuple[str, str] | None:
    """Command line and working folder of the last run that logged its start, for a shell; None where none did."""
    starts = []
    for name in store.names(FOLDER):
        for line in store.read(name).splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed process
                told = json.loads(line)
                if isinstance(told, dict) and told.get("event") == "start":
                    starts.append(told)
    if not starts:
        return None
    last = max(starts, key=lambda told: str(told["time"]))
    return shlex.join(last["command"]), str(last["cwd"])
