"""Requests to S3: which server, with which time-outs, and what to do when it does not answer as it should.

Which server (`AWS_ENDPOINT_URL`), which region (`AWS_REGION`) and the usual credentials are read from
the environment of each process. Both clients' own retries are off: `retrying` waits and tries again, so
that patience is counted once. Knows nothing of what is stored.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions as boto_errors
from pyarrow import fs

from llmvis.storage.base import StorageError

T = TypeVar("T")

CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 5.0, 20.0
PATIENCE_S = float(os.environ.get("LLMVIS_S3_PATIENCE_S", "300"))
"""How long one request is tried again before the job gives up."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 20.0
THREADS = 16
"""Requests at a time where there are many: a request is mostly waiting."""
_PASSING = re.compile(
    r"SLOW_DOWN|NETWORK_CONNECTION|REQUEST_TIMEOUT|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|"
    r"REQUEST_TIME_TOO_SKEWED|HTTP status (?:5\d\d|408|429)|HTTP response code (?:-1|5\d\d|408|429)|curlCode"
)
"""In the text of an error of `pyarrow.fs`: the AWS library's names for what passes."""


_DENIED = re.compile(
    r"access.?denied|invalid_?access_?key_?id|signature_?does_?not_?match|HTTP status 403", re.IGNORECASE
)


class CutShortError(OSError):
    """A body that ended before its length."""


def passes(error: Exception) -> bool:
    """Whether a request that failed like this may succeed when it is made again."""
    if isinstance(error, boto_errors.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or error.response["Error"]["Code"] in (
            "SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "InternalError",
        )  # fmt: skip
    if isinstance(error, boto_errors.HTTPClientError | boto_errors.ResponseStreamingError):
        return True
    if isinstance(error, CutShortError | TimeoutError | ConnectionError):
        return True
    return isinstance(error, OSError) and _PASSING.search(str(error)) is not None


def retrying(work: Callable[[], T], *, patience_s: float | None = None, where: str = "S3") -> T:
    """`work()`, again after each failure that passes, for `patience_s` (default `PATIENCE_S`).

    Waits a random part of 0.1, 0.2, 0.4, … 20 seconds ("full jitter"), so that many workers do not
    come back at the same moment. Raises `StorageError` when patience is at its end or access is
    denied; other errors of `work` as they are.
    """
    patience = PATIENCE_S if patience_s is None else patience_s
    until = time.monotonic() + patience
    wait = FIRST_WAIT_S
    while True:
        try:
            return work()
        except Exception as error:
            if not passes(error):
                raise _explained(error, where) from error
            if time.monotonic() > until:
                raise StorageError(
                    f"{where} has not answered as it should for {patience:.0f} s; run the job again when "
                    f"it does, and it goes on. The last answer: {str(error)[-300:]}"
                ) from error
        time.sleep(min(random.uniform(0, wait), max(0.0, until - time.monotonic()) + 0.01))
        wait = min(2 * wait, LONGEST_WAIT_S)


def _explained(error: Exception, where: str) -> Exception:
    """An error that does not pass, in words where it is the user's to mend."""
    if isinstance(error, StorageError | FileNotFoundError):
        return error
    text = str(error)
    if isinstance(error, boto_errors.ClientError):
        code = str(error.response["Error"]["Code"])
        if code in ("NoSuchKey", "404"):
            return FileNotFoundError(where)
        text = f"{code}: {error.response['Error'].get('Message', '')}"
    if isinstance(error, boto_errors.NoCredentialsError) or _DENIED.search(text):
        return StorageError(
            f"{where}: access is denied. Check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"a profile, or the node's role) and the bucket's policy. S3 says: {text[-200:]}"
        )
    if re.search("no_?such_?bucket", text, re.IGNORECASE):
        return StorageError(f"{where}: there is no such bucket (or AWS_REGION is another than the bucket's)")
    return error


def place(uri: str) -> tuple[str, str]:
    """Bucket and prefix of an `s3://` name. Raises `StorageError` for one that is none."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise StorageError(
            "an s3:// name must not hold credentials: plans and logs show it. Put them into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or the node's role"
        )
    prefix = parts.path.strip("/")
    if (
        not parts.netloc
        or parts.query
        or parts.fragment
        or {"", ".", ".."} & set(prefix.split("/") if prefix else ())
    ):
        raise StorageError(
            f"{uri} is no place in S3; write s3://bucket/prefix. Where it is not AWS, AWS_ENDPOINT_URL names the server"
        )
    return parts.netloc, prefix


def service() -> tuple[str | None, str | None]:
    """Endpoint and region, as the environment has them; None: AWS's own."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return endpoint, region or ("us-east-1" if endpoint else None)


@lru_cache
def arrow_filesystem(endpoint: str | None, region: str | None) -> fs.S3FileSystem:
    scheme, _, host = (endpoint or "https://").partition("://")
    return fs.S3FileSystem(
        endpoint_override=host or None, scheme=scheme, region=region,
        connect_timeout=CONNECT_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip


@lru_cache
def boto_client(endpoint: str | None, region: str | None) -> Any:
    config = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        max_pool_connections=2 * THREADS,
        s3={"addressing_style": "path"} if endpoint else {},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def filesystem(uri: str) -> tuple[fs.S3FileSystem, str]:
    """The file system of an `s3://` name, and the path in it. Wrap what is done with it in `retrying`."""
    bucket, prefix = place(uri)
    return arrow_filesystem(*service()), f"{bucket}/{prefix}".rstrip("/")


def read_part(file: Any, start: int, length: int) -> bytes:
    """`length` bytes from `start` of an open Arrow file, fewer only where the object ends.

    Raises `CutShortError`, which passes, where a body came that was cut short.
    """
    want = max(0, min(length, file.size() - start))
    data = bytes(file.read_at(want, start))
    if len(data) < want:
        raise CutShortError(f"{len(data)} bytes of {want} came")
    return data


def forget() -> None:
    """Lets go of clients, which keep the credentials of their first use."""
    arrow_filesystem.cache_clear()
    boto_client.cache_clear()
