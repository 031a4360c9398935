"""What the run of test_schemathesis.py is told beyond the document: to wait less than it may, and until what was promised has happened."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import requests
import schemathesis
from hypothesis import strategies as st

LONGEST_SLEEP = 50
"""Milliseconds that a TEST_JOB may take."""
LONGEST_WAIT = 0.1
"""Seconds."""

# Formats say less than the mail server's word would: an address that looks like a program's option is none here.
schemathesis.openapi.format("email", st.emails().filter(lambda address: not address.startswith("-")))


@schemathesis.serializer("application/x-ndjson")
def lines(context: Any, value: Any) -> bytes:
    """Each item of a list in a line of its own. What is no list must not become one of one item: it is a line that is no object."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in (value if isinstance(value, list) else [[value]]))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Shorten what would take long and be as right, and say nothing that a schema has no words to forbid."""
    case.body = _whole(case.body)
    _keep_keys_apart(case)
    for item in _items(case.body):
        for place in ("payload", "data"):
            payload = item.get(place)
            if isinstance(payload, dict) and type(payload.get("sleepMs")) is int and LONGEST_SLEEP < payload["sleepMs"] <= 3_600_000:
                payload["sleepMs"] = LONGEST_SLEEP
    wait = (case.query or {}).get("wait")
    if type(wait) in (int, float) and LONGEST_WAIT < wait <= 30:
        case.query["wait"] = LONGEST_WAIT


def _keep_keys_apart(case: Any) -> None:
    """No idempotency key for two different bodies, or for one body another than in the header."""
    items = _items(case.body)
    for item in items:
        _mark(item, "idempotencyKey", {name: value for name, value in item.items() if name != "idempotencyKey"})
    if case.headers and items:
        _mark(case.headers, "Idempotency-Key", case.body)
        if any("idempotencyKey" in item for item in items):
            case.headers.pop("Idempotency-Key", None)


def _mark(place: Any, name: str, meant: Any) -> None:
    key = place.get(name)
    if isinstance(key, str) and 1 <= len(key) <= 255:
        place[name] = key[: max(1, len(key) - 16)] + hashlib.sha256(json.dumps(meant).encode()).hexdigest()[:16]


def _items(body: Any) -> list[dict[str, Any]]:
    """The objects in a body of one or of many."""
    return [each for each in (body if isinstance(body, list) else [body]) if isinstance(each, dict)]


def _whole(value: Any) -> Any:
    """The value with 1 instead of 1.0, which are the same to a schema, and not to this server."""
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and abs(value) < 2**53 and value.is_integer() else value


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """A running job that was removed is gone once it has stopped; what is asked of it next is asked then."""
    if case.operation.method.upper() == "DELETE" and response.status_code == 202:
        for _ in range(200):
            if requests.get(response.request.url, timeout=5).status_code == 404:
                break
            time.sleep(0.05)
