"""What the commands that look after folders can be told: inspect, delete, retry, gc. See `config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from llmvis.config import at_least
from llmvis.retry import PASSING
from llmvis.schema import Reason, UserError

Folder = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what lies in a folder: how far a job is, who works on it, its ledger and dead letters; an index's health.

    Takes the --out of every job, an index, or the folder of a loop, and finds out which it is. Looks only, also while
    a job runs. Exit status 1 where something is damaged; then it says what, and what to do.

    For example:

      llmvis inspect enc/

      llmvis inspect idx/ --verify

      llmvis inspect enc/ --json
    """

    path: Folder
    """The folder."""
    verify: bool = False
    """Also read every file and compare its sha256."""
    examples: int = 3
    """Dead letters to show of each reason."""
    json: bool = False
    """Print all of it as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 0, "examples")


@dataclass(frozen=True, kw_only=True)
class DeleteConfig:
    """Delete pictures from an index: from then on no search finds them.

    A new version without them takes over at once; who has the last one open still sees them. They stay in the index's
    files until it is compacted (python -m jobs.index --compact), and pictures and embeddings stay where they are. What
    is deleted already is no error. With --ids and --where those are deleted that both name.

    For example:

      llmvis delete --index idx/ --ids gone.txt

      llmvis delete --index idx/ --where 'tag == "nsfw"' --dry-run
    """

    index: str
    """Folder that `jobs.index` made."""
    ids: str | None = None
    """File of ids, here or on S3: a text with one a line, or Parquet with a column `id`."""
    where: str | None = None
    """Those whose metadata fulfil this, written as for `llmvis search`: `width < 64 or caption is None`."""
    dry_run: bool = False
    """Say how many it would be, show a few, and stop."""
    json: bool = False
    """Print what was done as JSON."""

    def __post_init__(self) -> None:
        if self.ids is None and self.where is None:
            raise UserError("say what is to be deleted: --ids, --where, or both")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Put a job's dead letters back to work: what was mended comes in when the job's command is run again.

    Those that were missing, unreadable or changed are tried again; of all others, those whose input differs from what
    it was: a truncated picture replaced by a whole one. Nothing else is done again, and readers have the last result
    until the next one is published.

    For example:

      llmvis retry enc/ --dead

      llmvis retry enc/ --dead --reason truncated --reason model_error
    """

    path: Folder
    """The --out of a job."""
    dead: bool = False
    """Dead letters; so far nothing else can be retried, and it must be said."""
    reason: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Try these again though their input is as it was, instead of missing, unreadable and changed; may be given several times, also as a,b."""

    def __post_init__(self) -> None:
        if not self.dead:
            raise UserError("say what is to be tried again: --dead, the dead letters")
        if unknown := self.reasons - set(Reason):
            raise UserError(
                f"--reason {min(unknown)}: there is no such reason; there are {', '.join(Reason)}"
            )

    @property
    def reasons(self) -> frozenset[str]:
        """What is tried again whether or not its input has changed."""
        return frozenset(r.strip() for text in self.reason for r in text.split(",")) or frozenset(
            map(str, PASSING)
        )


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """Remove what nothing names any more: files of killed writers, results that a retry replaced, old versions of an index.

    Takes a job's --out, an index, or a loop's folder; refuses every other. Waits for nobody: where a job is at work it
    removes nothing. A reader that has an older version open keeps it; one that opens files of it later finds them gone.

    For example:

      llmvis gc enc/ --dry-run

      llmvis gc idx/ --keep 1
    """

    path: Folder
    """The folder."""
    keep: int = 2
    """Versions of an index that stay, the current one among them."""
    dry_run: bool = False
    """List what would be removed, and stop."""

    def __post_init__(self) -> None:
        at_least(self, 1, "keep")
