"""What a person types becomes a payload, a duration, a time. Whatever makes no sense is a click.UsageError that says what would."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from jobsys.errors import InvalidSubmission

if TYPE_CHECKING:
    from jobsys.job_types import JobType


def payload_from_fields(job_type: JobType, fields: Iterable[str]) -> dict[str, Any]:
    """The payload that `key=value` words mean: JSON where it is JSON, text where the job type wants text; `key:=value` is always JSON."""
    payload: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for field in fields:
        key, equals, text = field.partition("=")
        always_json = key.endswith(":")
        key = key.removesuffix(":")
        if not equals or not key:
            raise click.UsageError(f'"{field}" is not KEY=VALUE')
        if key in payload:
            raise click.UsageError(f'"{key}" is given twice; a list is written {key}=\'["a", "b"]\'')
        payload[key] = _json(text, field) if always_json else _json_or_text(text)
        if not always_json and not isinstance(payload[key], str):
            texts[key] = text
    # `to=123` may have been meant as text. The model decides: text stays where it has fewer complaints with it.
    for key, text in texts.items():
        as_text = {**payload, key: text}
        if _complaints(job_type, as_text) < _complaints(job_type, payload):
            payload = as_text
    return payload


def payload_from_json(text: str) -> Any:
    """A whole payload, as JSON text or `-` for standard input."""
    return _json(sys.stdin.buffer.read() if text == "-" else text, "--payload")


def duration(_context: Any, _parameter: Any, text: str | None) -> float | None:
    """Seconds from `30s`, `5m`, `2h` or a number of seconds."""
    from jobsys.settings import seconds

    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def moment(_context: Any, _parameter: Any, text: str | None) -> datetime | None:
    """A time in ISO 8601; without an offset it is this machine's local time."""
    try:
        return None if text is None else datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(f'"{text}" is not a time such as 2030-01-31T08:00 or 2030-01-31T08:00:00Z') from None


def statuses(_context: Any, _parameter: Any, names: tuple[str, ...]) -> list[str]:
    """Statuses from their names, in any case, synonyms included."""
    from jobsys.api import wire

    try:
        return [wire.status(name) for name in names]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{where}: not JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _complaints(job_type: JobType, payload: Any) -> int:
    try:
        job_type.check(payload)
    except InvalidSubmission as error:
        return len(error.errors)
    return 0
