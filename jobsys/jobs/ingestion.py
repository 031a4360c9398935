"""INGEST_BATCH: fetches each id of a batch from INGEST_URL. How fast batches start is the queue's limit, nothing of this file.

Within an attempt only the ids that failed are asked for again. When some still fail the attempt does, and the next one, after the
job's own backoff, fetches the whole batch: nothing is kept between attempts.
"""

from __future__ import annotations

import functools
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

from pydantic import Field

from jobsys import GiveUp, Job, Payload, job
from jobsys.job_types import encode
from jobsys.jobs import settings

TIMEOUT = 10.0
"""Seconds to wait for a connection, and for each next part of an answer."""
PAUSES = (0.5, 1.0)
"""Seconds before the ids that failed are fetched again, each time."""
ANSWER_BYTES = 1_000_000
BATCH_BYTES = 32_000_000

Id = Annotated[int, Field(ge=1, le=10**9 + 7)]


class IngestBatch(Payload):
    """The ids of one batch."""

    ids: list[Id] = Field(min_length=1, max_length=100_000, description="The ids to fetch, in this order.")


@job("INGEST_BATCH", queue="ingestion", time_limit="1h", max_share=0.5, trip_after=20, aliases=["ingestBatch"], example={"ids": [1, 2, 3]})
def ingest_batch(payload: IngestBatch, job: Job) -> dict[str, Any]:
    """Fetch each id of a batch, or mark it processed when no INGEST_URL is set."""
    url = settings().ingest_url
    fetched = _fetch_all(payload.ids, url, job) if url else dict.fromkeys(payload.ids, "processed")
    return {"results": [{"id": n, "data": fetched[n]} for n in payload.ids]}


def _fetch_all(ids: list[int], url: str, job: Job) -> dict[int, Any]:
    """The data of each id. Raises RuntimeError naming the ids that failed to the last, GiveUp when the answers are too much to keep."""
    fetched: dict[int, Any] = {}
    size = 0
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        failed: dict[int, Exception] = {}
        for n in dict.fromkeys(ids):
            if n in fetched:
                continue
            job.checkpoint()
            try:
                fetched[n], length = _fetch(url.replace("{id}", str(n)))
            except Exception as error:  # whatever is wrong with one id, the others are fetched
                failed[n] = error
                continue
            size += length
            if size > BATCH_BYTES:
                raise GiveUp(f"the answers for this batch are more than {BATCH_BYTES:,} bytes: submit fewer ids at a time")
            if len(fetched) % 100 == 0:
                job.progress(len(fetched) / len(ids), f"{len(fetched):,} of {len(ids):,} ids")
        if not failed:
            return fetched
        complaint = f"{len(failed)} of {len(ids)} ids could not be fetched: {_named(failed)}"
        job.log(complaint)
    raise RuntimeError(complaint) from next(iter(failed.values()))


def _named(failed: dict[int, Exception]) -> str:
    named = [f"{n}: {str(error)[:200]}" for n, error in list(failed.items())[:20]]
    return "; ".join([*named, "…"] if len(failed) > len(named) else named)


def _fetch(url: str) -> tuple[Any, int]:
    """What a GET of `url` answers, as JSON when it says it is JSON and else as text, and its length in bytes.

    Raises an exception for any status but 2xx, an answer that is too long or breaks off, and one that can't be stored.
    """
    request = urllib.request.Request(url, headers={"Accept": "application/json, */*;q=0.5", "User-Agent": "jobsys"})
    try:
        with _opener().open(request, timeout=TIMEOUT) as response:
            body = response.read(ANSWER_BYTES + 1)
            if len(body) > ANSWER_BYTES:
                raise ValueError(f"the answer is longer than {ANSWER_BYTES:,} bytes")
            if response.length:  # what the announced length still lacks; read(n) says nothing of it
                raise http.client.IncompleteRead(body, response.length)
            kind, charset = response.headers.get_content_type(), response.headers.get_content_charset("utf-8")
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    if kind != "application/json" and not kind.endswith("+json"):
        return body.decode(charset, errors="replace").replace("\0", "\ufffd"), len(body)
    data = json.loads(body)
    encode(data)
    return data, len(body)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5


@functools.lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """urllib's own, less the ways of following a redirect to anything but http and https."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Redirects,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
