"""The words and shapes that stages share: reasons for dead letters, columns, Arrow schemas.

What a file on disk contains is stated here and nowhere else. This module knows
nothing of torch, Ray or faiss, and does not read or write files.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import pyarrow as pa

FORMAT_VERSION = 1
"""Of plans, manifests and markers; a reader refuses a higher one."""

MAX_CAPTION = 2_000
"""Characters of a caption that are kept; what was cut is flagged in `caption_truncated`."""


MAKERS = ("translate", "generate", "dataset", "seeds")
"""Jobs whose rows are pictures (`made.MADE`)."""

SCORES, ROWS = "work/scores", "work/rows"
"""In a data set's folder: the job that scored its pictures; where it is an imagefolder, the one that wrote
its rows in Parquet."""


class UserError(ValueError):
    """A mistake that can be explained: a command prints its message, which says what to do, and no traceback."""


class Reason(StrEnum):
    """Why an input item became a dead letter. The list is short and closed."""

    MISSING = "missing"  # listed or named, but not there when it was read
    UNREADABLE = "unreadable"  # permission denied, I/O error, not a regular file
    LINK = "link"  # symbolic link that dangles, loops or leaves the collection
    UNSAFE_PATH = "unsafe_path"  # a name in a table that points out of the collection
    DUPLICATE_KEY = "duplicate_key"  # a key that its archive has already
    CHANGED = "changed"  # size or time differs from what the plan saw
    EMPTY = "empty"  # no bytes, or a null cell
    NOT_AN_IMAGE = "not_an_image"  # the content is no image: HTML, text, random bytes
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image we do not decode: SVG, HEIC, EPS, float TIFF
    TOO_LARGE = "too_large"  # over the cap on bytes or on pixels
    TRUNCATED = "truncated"  # the file ends before the picture does
    CORRUPT = "corrupt"  # the decoder failed, or the picture has no pixels
    UNSUITABLE = "unsuitable"  # asked for what cannot be done with this picture, or its mask does not fit
    CRASHED = "crashed"  # it killed the process that read it or ran the model on it
    TIMEOUT = "timeout"  # it took longer than an item may
    OUT_OF_MEMORY = "out_of_memory"  # it wanted more memory than an item may have
    MODEL_ERROR = "model_error"  # the model gave NaN or infinity for this item
    BAD_VECTOR = "bad_vector"  # a query's vector of another dimension, not finite, or all zeros
    BLANK = "blank"  # a made picture of nearly one colour
    LOW_SCORE = "low_score"  # a made picture that scores below the minimum asked for
    DUPLICATE_PICTURE = "duplicate_picture"  # a made picture with the same pixels as an earlier one
    NEAR_DUPLICATE = "near_duplicate"  # a made picture too like an earlier one
    IN_INDEX = "in_index"  # a made picture too like one in the index it was held against
    NOT_BEST = "not_best"  # a made picture with enough better ones of the same source or prompt


DEAD_LETTER = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

LISTING = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),  # what people read: UTF-8, odd bytes escaped
        ("locator", pa.binary()),  # what the reader opens; its meaning is the source's own
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("caption", pa.string()),
        ("caption_locator", pa.binary()),  # a caption that lies in a file of its own
        ("caption_mtime_ns", pa.int64()),
        ("reason", pa.string()),  # not null: the listing itself found the item bad
        ("detail", pa.string()),
    ]
)
"""One row per input item, in canonical order; the user's own columns follow."""


def encoded(dim: int, user_columns: list[pa.Field]) -> pa.Schema:
    """What `jobs.encode` writes: a row per picture; `embedding` is unit length, fp16."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("locator", pa.binary(), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("caption_truncated", pa.bool_(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(pa.float16(), dim), nullable=False),
            *user_columns,
        ]
    )


RESERVED = frozenset(LISTING.names) | frozenset(encoded(1, []).names) | {"rank", "score", "_source"}
"""Names that a user's column cannot have; it is carried as `source_<name>`."""


def item_id(key: bytes) -> str:
    """128-bit id of an item, in hex: a hash of its canonical key, the same on every run."""
    return hashlib.blake2b(key, digest_size=16).hexdigest()


class ItemError(ValueError):
    """One input item that cannot be used: it becomes a dead letter, the job goes on."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ItemError], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


def printable(text: str) -> str:
    """Foreign text as it may go to a terminal: control characters and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
