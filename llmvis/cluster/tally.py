"""How often each piece of work was begun: what tells a picture that kills its worker from a lost node.

Ray runs a task again when its worker dies, and says nothing of it to the task. So every stage
tells a small actor when it begins and when it has done a shard; work that was begun and not
done again and again has something deadly in it. Counts of what died once already are kept in the
cluster's own key-value store, since where memory is short Ray may kill this actor too; the others
are in memory only, and a restart then costs a try and no rows.
Knows nothing of shards' contents.
"""

from __future__ import annotations

import faulthandler
import pickle
import sys
import time
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ray
from ray.experimental.internal_kv import (  # no public name
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmvis.schema import UserError

CAREFUL_AFTER = 2
"""Workers that died over a shard in a stage, before it is done item by item. One death is a lost
node or a killed process more often than a picture."""

DIED_ENOUGH = 5
"""Such deaths that end the job: even item by item, in a child process, the worker died."""

BEGUN_ENOUGH = 16
"""Times a stage may begin a shard, whatever the reason, before the job ends: results lost with
their nodes are made again, but not for ever."""


LOAD = "load"
"""The stage in which an actor loads its model; it comes again with each restart of the actor."""


class JobError(UserError):
    """A job that cannot be finished as things are; the message says what to do."""


class Manner(StrEnum):
    """How to go about a piece of work, by what became of it before."""

    WHOLE = "whole"
    CAREFUL = "careful"
    NOT = "not"


@dataclass
class _Count:
    begun: int = 0
    done: int = 0
    last: float = 0.0
    until: float = 0.0
    call: str = ""
    manner: Manner = Manner.WHOLE


class Tally:
    """The counts of one job; `limit`: seconds that a shard may take in a stage (see `at_work`)."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._counts: dict[tuple[str, Hashable], _Count] = {}

    def begin(self, stage: str, what: Hashable, call: str = "") -> Manner:
        """Counts one more beginning; says how to go about it.

        A worker that was there for `limit` seconds and then was not has hung: that is sure at
        once, and need not be waited for twice. Two with the same `call` are one: Ray calls again
        where the answer to the first was lost.
        """
        count = self._counts.setdefault((stage, what), _Count())
        if not call or call != count.call:
            count.manner = self._next(count, stage)
            count.call = call
        return count.manner

    def _next(self, count: _Count, stage: str) -> Manner:
        now = time.monotonic()
        died = count.begun - count.done
        hung = died > 0 and now - count.last >= self._limit
        count.begun += 1
        count.last = now
        count.until = now + self._limit
        if stage == LOAD:  # there is no way to load with more care
            return Manner.NOT if died > CAREFUL_AFTER - hung else Manner.WHOLE
        if died >= DIED_ENOUGH or count.begun > BEGUN_ENOUGH:
            return Manner.NOT
        return Manner.CAREFUL if died >= CAREFUL_AFTER or hung else Manner.WHOLE

    def goes_on(self, stage: str, what: Hashable) -> None:
        """Careful work has come to its next item, which has `limit` seconds at most."""
        if count := self._counts.get((stage, what)):
            count.until = time.monotonic() + self._limit

    def done(self, stage: str, what: Hashable) -> None:
        """Counts an end, good or with an error that was told; deaths tell nothing."""
        if count := self._counts.get((stage, what)):
            count.done = min(count.begun, count.done + 1)

    def working(self) -> int:
        """Pieces of work that were begun, are not done, and have time left."""
        now = time.monotonic()
        return sum(c.begun > c.done and now < c.until for c in self._counts.values())


class KeptTally(Tally):
    """A tally that finds its counts of deaths again when it is started anew under the same key."""

    def __init__(self, limit: float, key: str) -> None:
        super().__init__(limit)
        self._key = key
        self._counts = pickle.loads(_internal_kv_get(key) or pickle.dumps({}))  # noqa: S301 - written below

    def begin(self, stage: str, what: Hashable, call: str = "") -> Manner:
        """As a `Tally`; what died before is kept before it is begun again."""
        manner = super().begin(stage, what, call)
        deadly = {key: count for key, count in self._counts.items() if count.begun - count.done > 1}
        if (stage, what) in deadly:
            _internal_kv_put(self._key, pickle.dumps(deadly), overwrite=True)
        return manner


@contextmanager
def started_tally(limit: float) -> Iterator[Any]:
    """A handle of a `Tally` for the length of a job, on the driver's node: it asks for no CPU, and is
    started anew if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    key = f"llmvis-tally-{uuid.uuid4().hex}"
    tally: Any = ray.remote(KeptTally).options(**options).remote(limit, key)
    try:
        yield tally
    finally:
        ray.kill(tally)
        _internal_kv_del(key)


@contextmanager
def at_work(tally: Any, stage: str, what: Hashable, limit: float, *, by_item: bool = False) -> Iterator[bool]:
    """Counts the block as one piece of work; gives whether to do it item by item, where it can be.

    Else a block that takes `limit` seconds ends this process, even where native code hangs and
    lets no Python run: Ray then tries again. Raises `JobError` for what has been tried often
    enough.
    """
    manner = ray.get(tally.begin.remote(stage, what, uuid.uuid4().hex))
    if manner == Manner.NOT:
        raise JobError(_gave_up(stage, what))
    careful = by_item and manner == Manner.CAREFUL
    if not careful:
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield careful
    finally:
        faulthandler.cancel_dump_traceback_later()
        tally.done.remote(stage, what)  # nobody waits for it


def _gave_up(stage: str, what: Hashable) -> str:
    if stage == LOAD:
        return (
            "the model cannot be loaded: each worker process that tried died of it or took longer than --timeout. "
            "Is there memory enough for it on the node, and is its folder whole?"
        )
    return (
        f"workers died again and again over shard {what} in the stage {stage}, also item by item: the node lacks "
        "memory, or kills processes. What is committed stays; give the job more memory or fewer --actors, and run "
        "it again to go on"
    )
