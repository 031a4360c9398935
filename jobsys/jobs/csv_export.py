"""CSV_EXPORT: rows into OUTPUT_DIR/<jobId>.csv, which appears whole or not at all.

The rows are written to a file in OUTPUT_DIR/.partial, made durable, and renamed; what a crashed attempt left there is removed by
the job's next attempt, and by any export once it is a day old. Cells that a spreadsheet would run as a formula get a `'` in front.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, ValidationInfo, field_validator

from jobsys import Job, Payload, job
from jobsys.job_types import encode
from jobsys.jobs import settings

STEP = 10_000
"""Rows between two reports of progress, and two looks at whether the job has to stop."""
MAX_CELLS = 100_000_000
LEFTOVER_AGE = 86_400.0
START = Path.cwd()
"""What a relative OUTPUT_DIR is relative to: some other job may change this process's directory."""

# https://owasp.org/www-community/attacks/CSV_Injection, full-width forms of the signs included
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The union of the rows' keys, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


class CsvExport(Payload):
    """The rows to write; `filename` is only the name offered for download."""

    data: list[dict[str, Any]] = Field(description="The rows, each an object of column name to value.")
    columns: Annotated[list[str], Field(json_schema_extra={"uniqueItems": True})] | None = Field(
        None,
        description="The columns to write, in this order. Left out: every key of the rows, in order of first appearance.",
    )
    filename: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$",
        description="Name offered for download: letters, digits, dots, dashes, underscores.",
    )

    @field_validator("data")
    @classmethod
    def _bounded(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # a megabyte of rows that share no key would make a file of gigabytes, all commas
        if len(rows) * len(_columns(rows)) > MAX_CELLS:
            raise ValueError(f"makes a table of more than {MAX_CELLS:,} cells: its rows have too few columns in common")
        return rows

    @field_validator("columns")
    @classmethod
    def _bounded_too(cls, columns: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if columns is not None and len(info.data.get("data", ())) * len(columns) > MAX_CELLS:
            raise ValueError(f"makes a table of more than {MAX_CELLS:,} cells")
        return columns

    @field_validator("columns")
    @classmethod
    def _distinct(cls, columns: list[str] | None) -> list[str] | None:
        if columns is not None and len(set(columns)) < len(columns):
            raise ValueError("names a column twice")
        return columns

    def to_store(self, given: str) -> str:
        """With `columns`: the database does not keep the order of keys, so it is written down where it is still known."""
        return given if self.columns is not None else encode({**json.loads(given), "columns": _columns(self.data)})


@job(
    "CSV_EXPORT",
    aliases=["csvExport", "csv"],
    example={"data": [{"name": "Ada", "born": 1815}, {"name": "Grace", "born": 1906, "rank": "Rear Admiral"}], "filename": "people.csv"},
)
def export_csv(payload: CsvExport, job: Job) -> dict[str, Any]:
    """Write rows to a CSV file, with a header of all their columns."""
    path = settings().output_dir / f"{job.id}.csv"
    columns = _columns(payload.data) if payload.columns is None else payload.columns
    with _whole_or_not(START / path) as file:
        measured = _Measured(file)
        writer = csv.writer(measured)
        writer.writerow([_cell(name) for name in columns])
        for number, row in enumerate(payload.data, start=1):
            writer.writerow([_cell(row.get(name)) for name in columns])
            if number % STEP == 0:
                job.checkpoint()
                job.progress(number / len(payload.data), f"{number:,} of {len(payload.data):,} rows")
    result = {"file": str(path), "rows": len(payload.data), "bytes": measured.size, "sha256": measured.digest.hexdigest()}
    return result if payload.filename is None else {**result, "filename": payload.filename}


def _cell(value: Any) -> Any:
    """What csv.writer is to write for a JSON value."""
    if isinstance(value, str):
        return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return value


class _Measured:
    """Encodes text on its way into a file, counts its bytes and takes their hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, text: str) -> None:
        data = text.encode()
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


@contextlib.contextmanager
def _whole_or_not(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is durable and called `path` when the block ends well, and is gone when it doesn't."""
    partial = path.parent / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(partial, path.name)
    temporary = partial / f"{path.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _remove_leftovers(partial: Path, name: str) -> None:
    """Remove what earlier attempts at this file left behind, and anyone's leftovers of more than a day ago.

    An attempt that was taken for dead and still writes then fails at its end, instead of replacing the file of the one that took over.
    """
    for leftover in partial.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another job removes them at the same time
            if leftover.name.startswith(name) or leftover.stat().st_mtime < time.time() - LEFTOVER_AGE:
                leftover.unlink()


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory as durable as the files they name."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
