"""A lock that is an object: taken by a conditional write, renewed while its holder lives."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import botocore.exceptions as boto_errors
import psutil

from llmvis.storage.base import LockedError, Owner

BEAT_S = 5.0
"""How often the holder of a lock says that it lives."""
SILENCE_S = 30.0
"""A lock that has not been renewed for so long, by the clock of the one who waits, is nobody's."""


class Lease:
    """One holder's claim to a lock object."""

    def __init__(
        self, client: Any, bucket: str, key: str, shown: str, attempt: Callable[[Callable[[], Any]], Any]
    ) -> None:
        self._client, self._object, self._shown = client, {"Bucket": bucket, "Key": key}, shown
        self._attempt = attempt
        self._me = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "since": time.time(),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._beats, self._etag, self._lost, self._last = 0, "", False, 0.0
        self._stop, self._beating = threading.Event(), threading.Lock()

    def owner(self) -> Owner | None:
        """Who holds it; None where nobody does, or a process of this machine that is gone."""
        _, found = self._look()
        return owner_of(found) if found and not self._is_dead(found) else None

    def acquire(self) -> None:
        """Raises `LockedError` where somebody else holds it and lives."""
        until, seen = None, ""
        while not self._take({"IfNoneMatch": "*"}):
            etag, owner = self._look()
            if not etag:
                continue  # let go of just now
            who = owner_of(owner)
            if self._is_dead(owner) or (until is not None and etag == seen and time.monotonic() > until):
                if self._take({"IfMatch": etag}):
                    break
                continue
            if until is None:
                print(
                    f"{self._shown} is marked as in use by {who}; waiting {SILENCE_S:.0f} s to see whether it lives",
                    file=sys.stderr,
                )
                until = time.monotonic() + SILENCE_S
            elif etag != seen:
                raise LockedError(
                    f"{self._shown} is in use by {who}; wait for it, stop it, or choose another --out"
                )
            seen = etag
            time.sleep(1)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        pid = owner.get("pid")
        return (
            owner.get("machine") == self._me["machine"] != ""
            and isinstance(pid, int)
            and not psutil.pid_exists(pid)
        )

    def _take(self, condition: dict[str, str]) -> bool:
        """Writes our claim under a condition; True if it is ours now, also where only the answer was lost."""
        self._beats += 1
        body = json.dumps(self._me | {"beat": self._beats}).encode()

        def put() -> str | None:
            try:
                answer = self._client.put_object(**self._object, Body=body, **condition)
                return str(answer["ETag"])
            except boto_errors.ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status not in (409, 412, 404):
                    raise
                etag, owner = self._look()
                return etag if owner.get("token") == self._me["token"] else None

        begun = time.monotonic()
        if etag := self._attempt(put):
            self._etag, self._last = etag, begun
        return bool(etag)

    def holds(self) -> bool:
        """Whether nobody can have taken the lock; asks, where the last beat is long ago."""
        if not self._lost and time.monotonic() - self._last > SILENCE_S:
            self._beat()
        return not self._lost

    def _look(self) -> tuple[str, dict[str, Any]]:
        """The lock's version and who holds it; empty where there is none."""

        def get() -> tuple[str, dict[str, Any]]:
            try:
                answer = self._client.get_object(**self._object)
                return str(answer["ETag"]), json.loads(answer["Body"].read() or b"{}")
            except self._client.exceptions.NoSuchKey:
                return "", {}
            except ValueError:
                return "", {}

        found: tuple[str, dict[str, Any]] = self._attempt(get)
        return found

    def _beat(self) -> None:
        with self._beating:
            if not self._lost and not self._take({"IfMatch": self._etag}):
                self._lost = True

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            with suppress(Exception):  # the next beat tries again; `holds` asks before anything is published
                self._beat()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(Exception):  # if not, it falls silent by itself
            if self.holds():
                self._attempt(lambda: self._client.delete_object(**self._object))


def owner_of(told: dict[str, Any]) -> Owner:
    """What a lock object says; a foreign one gives an owner without a name."""
    try:
        return Owner(host=str(told["host"]), pid=int(told["pid"]), since=float(told["since"]))
    except (KeyError, TypeError, ValueError):
        return Owner(host="an unknown machine", pid=0, since=0.0)


def _machine() -> str:
    """What processes share that can see each other by number: one boot of one machine, and one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {space.readlink()}" if boot.exists() and space.exists() else ""
