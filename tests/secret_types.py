"""A job type that lets every secret slip that it knows, for test_secrets.py. Its workers load this module through JOB_MODULES."""

from __future__ import annotations

import logging
import os

from jobsys import Job, Payload, job

SLIPS = (
    "no route to postgresql://bob:exc-hush-url@db/jobs and amqp://bob:exc-hush@at@mq:5672",
    "{'password': 'exc-hush-dict', \"api_key\": \"exc-hush-json\"} host=db password=exc-hush-dsn",
    "Authorization: Bearer exc.hush.header1; sent Bearer exc-hush-bearer1 and Basic ZXhjOmh1c2gtYmFzaWM=",
    "Cookie: session=exc-hush-cookie; GET /x?user=1&access_token=exc-hush-query&b=2",
    "a token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJleGMtaHVzaCJ9.c2lnbmVk lies about",
)


class Talk(Payload):
    """What is given back."""

    password: str


@job("TALKER", max_retries=1)
def talker(payload: Talk, job: Job) -> None:
    """Log, report, and at last raise everything it knows."""
    names = ("DATABASE_URL", "SMTP_PASSWORD", "ADMIN_PASS", "VIEWER_PASS", "JWT_SECRET", "JWT_SECRET_PREVIOUS")
    known = [os.environ[name] for name in names]
    for text in (*SLIPS, *known):
        job.log(text)
        logging.getLogger("talker").warning(text)
    job.progress(0.5, f"at {known[1]}")
    try:
        raise ValueError(SLIPS, known)
    except ValueError as error:
        raise RuntimeError("; ".join((*SLIPS, *known))) from error
