"""INGEST_BATCH: fetches each id of a batch from INGEST_URL. How fast batches start is the queue's limit, nothing of this file.

Within an attempt only the ids that failed are asked for again. When some still fail the attempt does, and the next one, after the
job's own backoff, fetches the whole batch: nothing is kept between attempts.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from pydantic import Field

from jobsys import GiveUp, Job, Payload, job, outgoing
from jobsys.job_types import encode
from jobsys.jobs import settings

TIMEOUT = 10.0
"""Seconds to wait for a connection, and for each next part of an answer…"""
TOTAL = 60.0
"""…and for all of it, redirects included."""
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

    Raises an exception for whatever `outgoing.get` does, and for an answer that can't be stored.
    """
    private = settings().ingest_allow_private
    body, kind, charset = outgoing.get(url, most_bytes=ANSWER_BYTES, timeout=TIMEOUT, total=TOTAL, allow_private=private)
    if kind != "application/json" and not kind.endswith("+json"):
        return body.decode(charset, errors="replace").replace("\0", "\ufffd"), len(body)
    data = json.loads(body)
    encode(data)
    return data, len(body)
