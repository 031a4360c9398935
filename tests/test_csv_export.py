"""CSV_EXPORT: what stands in the file, and that it is there whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jobsys import Job
from jobsys.errors import InvalidSubmission, JobStopped
from jobsys.job_types import registry
from jobsys.jobs import csv_export, settings
from jobsys.jobs.csv_export import CsvExport, export_csv

JOB_ID = "019aaaaa-0000-7000-8000-00000000c5f0"


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "output"))
    settings.cache_clear()
    yield tmp_path / "output"
    settings.cache_clear()


def export(data: list[dict[str, Any]], job: Job | None = None, **more: Any) -> dict[str, Any]:
    result: dict[str, Any] = registry.load().types["CSV_EXPORT"].run(json.dumps({"data": data, **more}), job or Job(JOB_ID))
    return result


def written(data: list[dict[str, Any]]) -> str:
    return Path(export(data)["file"]).read_bytes().decode("utf-8")


def cell_of(value: Any) -> str:
    """The cell as a reader of CSV gets it."""
    rows = list(csv.reader(written([{"a": 0, "b": value}]).splitlines(keepends=True)))
    assert rows[0] == ["a", "b"] and len(rows) == 2
    return rows[1][1]


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_the_order_of_columns_survives_a_database_that_sorts_keys() -> None:
    stored = json.loads(registry.load().types["CSV_EXPORT"].check({"data": [{"zeta": 1, "a": 2}, {"b": 3}]}))
    sorted_by_the_database = {"data": [dict(sorted(row.items())) for row in stored["data"]], "columns": stored["columns"]}
    assert export(**sorted_by_the_database)["rows"] == 2
    assert (settings().output_dir / f"{JOB_ID}.csv").read_text().splitlines()[0] == "zeta,a,b"


def test_columns_that_are_named_are_written_and_no_others() -> None:
    export([{"a": 1, "b": 2, "c": 3}], columns=["c", "a"])
    assert (settings().output_dir / f"{JOB_ID}.csv").read_text().splitlines() == ["c,a", "3,1"]


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(InvalidSubmission, match="twice"):
        registry.load().types["CSV_EXPORT"].check({"data": [], "columns": ["a", "a"]})
    with pytest.raises(jsonschema.ValidationError, match="non-unique"):
        jsonschema.validate({"data": [], "columns": ["a", "a"]}, CsvExport.model_json_schema())


def test_the_header_is_the_union_of_the_keys_in_order_of_first_appearance() -> None:
    assert written([{"b": 1, "a": 2}, {"c": 3, "a": 4}, {}]) == "b,a,c\r\n1,2,\r\n,4,3\r\n,,\r\n"


def test_the_result_describes_the_file_that_is_there(output: Path) -> None:
    result = export([{"name": "Ada"}, {"name": "Žofie, PhD"}], filename="people.csv")
    data = (output / f"{JOB_ID}.csv").read_bytes()
    assert data == 'name\r\nAda\r\n"Žofie, PhD"\r\n'.encode()
    assert result == {
        "file": str(output / f"{JOB_ID}.csv"),
        "rows": 2,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "filename": "people.csv",
    }


def test_no_rows_make_a_file_without_rows(output: Path) -> None:
    assert export([])["rows"] == 0
    assert (output / f"{JOB_ID}.csv").read_bytes().strip() == b""


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, ""),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (-7, "-7"),
        (2**70, "1180591620717411303424"),
        (1.5, "1.5"),
        (-1e-9, "-1e-09"),
        ("", ""),
        ("plain", "plain"),
        ('say "hi"', 'say "hi"'),
        ("two\r\nlines", "two\r\nlines"),
        ("a,b;c", "a,b;c"),
        (" padded ", " padded "),
        ("日本 🎉", "日本 🎉"),
        ({"x": [1, None]}, '{"x": [1, null]}'),
        (["=1+1", "é"], '["=1+1", "é"]'),
        ([], "[]"),
    ],
)
def test_a_value_comes_back_as_the_text_of_its_cell(value: Any, cell: str) -> None:
    assert cell_of(value) == cell


@pytest.mark.parametrize(
    "text",
    [
        *("=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\tx", "  =1+1", "\u00a0=1", "-", "=", "+1\n"),
        *("\uff1d1+1", "\uff0b1", "\uff0d1", "\uff20x", "-\u0661", "+49 30 123", "-0x10", "-1e"),
        *("-1-cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0"),
    ],
)
def test_text_that_a_spreadsheet_would_run_as_a_formula_is_defused(text: str) -> None:
    assert cell_of(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-5", "+3.14", "-.5", "-5.", "-1e5", "+1E-9", "1-2", "a=b", "'=1", "mail@example.org"])
def test_text_that_is_a_number_or_merely_contains_a_sign_stays(text: str) -> None:
    assert cell_of(text) == text


def test_header_cells_are_defused_and_quoted_too() -> None:
    assert written([{"=cmd()": 1, 'a "b", c': 2}]) == '\'=cmd(),"a ""b"", c"\r\n1,2\r\n'


def test_a_hostile_cell_is_looked_at_in_linear_time() -> None:
    started = time.perf_counter()
    for text in ("-" + "1" * 500_000 + "x", " " * 500_000 + "x", "-1e" + "1" * 500_000 + "x"):
        written([{"a": text}])
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "filename", ["", "../x.csv", "/etc/passwd", ".hidden", "-rf", "a b.csv", "a\n.csv", "a.csv\n", "C:\\x", "é.csv", "x" * 101, 5]
)
def test_a_filename_that_is_no_plain_name_is_refused(filename: Any) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        registry.load().find("csvExport").check({"data": [], "filename": filename})
    assert [error["loc"] for error in refusal.value.errors] == [["payload", "filename"]]


@pytest.mark.parametrize("data", [None, {}, "a,b", [1], [[1]], ["a"]])
def test_data_that_is_no_list_of_objects_is_refused(data: Any) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        registry.load().find("csv").check({"data": data})
    assert all(error["loc"][:2] == ["payload", "data"] for error in refusal.value.errors)


def test_rows_that_share_no_columns_cannot_blow_up_into_gigabytes_of_commas() -> None:
    with pytest.raises(InvalidSubmission, match=r"payload\.data: makes a table of more than 100,000,000 cells"):
        registry.load().find("csv").check({"data": [{f"k{n}": 1} for n in range(10_001)]})
    with pytest.raises(InvalidSubmission, match=r"payload\.columns: makes a table of more than 100,000,000 cells"):
        registry.load().find("csv").check({"data": [{}] * 50_000, "columns": [f"k{n}" for n in range(2_001)]})


def test_the_file_on_disk_is_named_by_the_job_and_an_earlier_one_is_replaced(output: Path) -> None:
    output.mkdir()
    elsewhere = output.parent / "elsewhere"
    elsewhere.write_text("not mine")
    (output / f"{JOB_ID}.csv").symlink_to(elsewhere)
    export([{"a": 1}], filename="other.csv")
    assert files_in(output) == [f"{JOB_ID}.csv"]
    assert (output / f"{JOB_ID}.csv").read_text() == "a\n1\n" and elsewhere.read_text() == "not mine"


def test_a_job_that_is_stopped_leaves_no_file(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_export, "STEP", 10)
    job = Job(JOB_ID)
    job.stop_reason = "cancelled"
    with pytest.raises(JobStopped):
        export([{"a": n} for n in range(100)], job)
    assert files_in(output) == []


def test_a_stopped_job_leaves_the_file_of_an_earlier_attempt_as_it_was(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export([{"a": 1}])
    monkeypatch.setattr(csv_export, "STEP", 10)
    job = Job(JOB_ID)
    job.stop_reason = "cancelled"
    with pytest.raises(JobStopped):
        export([{"a": n} for n in range(100)], job)
    assert (output / f"{JOB_ID}.csv").read_text() == "a\n1\n"


def test_a_full_disk_is_an_ordinary_failure_that_leaves_no_file(output: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # the kernel refuses to write beyond, as a full disk does
    try:
        with pytest.raises(OSError):
            export([{"a": "x" * 100} for _ in range(10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(output) == []
    assert export([{"a": 1}])["rows"] == 1


def test_an_output_directory_that_cannot_be_made_is_an_ordinary_failure(output: Path) -> None:
    output.write_text("a file is in the way")
    with pytest.raises(OSError):
        export([{"a": 1}])


def test_a_killed_attempt_leaves_nothing_under_the_final_name_and_the_next_one_cleans_up(output: Path) -> None:
    program = (
        "from jobsys import Job; from jobsys.jobs.csv_export import CsvExport, export_csv\n"
        f"rows = [{{'a': 'x' * 100}}] * 3_000_000\nexport_csv(CsvExport.model_construct(data=rows, filename=None), Job({JOB_ID!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        deadline = time.monotonic() + 20
        while not files_in(output):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    left = files_in(output)
    assert len(left) == 1 and not (output / left[0]).exists() and not (output / f"{JOB_ID}.csv").exists()
    export([{"a": 1}])
    assert files_in(output) == [f"{JOB_ID}.csv"]


def test_leftovers_of_other_jobs_go_when_they_are_a_day_old(output: Path) -> None:
    partial = output / ".partial"
    partial.mkdir(parents=True)
    for name, age in (("old.csv.1", 90_000), ("running.csv.1", 60)):
        (partial / name).write_text("half")
        os.utime(partial / name, (time.time() - age, time.time() - age))
    export([{"a": 1}])
    assert files_in(output) == [f"{JOB_ID}.csv", "running.csv.1"]


def test_an_attempt_that_was_taken_for_dead_cannot_replace_the_file_of_its_successor(output: Path) -> None:
    path = output / f"{JOB_ID}.csv"
    with pytest.raises(FileNotFoundError), csv_export._whole_or_not(path) as zombie:
        zombie.write(b"half a fi")
        export([{"a": 1}])
    assert path.read_text() == "a\n1\n" and files_in(output) == [path.name]


def test_rows_are_written_in_constant_memory_and_progress_is_told() -> None:
    job = Job(JOB_ID)
    payload = CsvExport.model_validate_json(json.dumps({"data": [{"id": n, "name": f"row {n}", "sign": "=1+1"} for n in range(30_000)]}))
    tracemalloc.start()
    try:
        result = export_csv(payload, job)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result["rows"] == 30_000 and result["bytes"] > 500_000
    assert peak < 300_000, peak
    assert job.fraction == 1.0
