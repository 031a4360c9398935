"""What a job type may be, how it is found, what every registered one keeps to, and TEST_JOB."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobsys import GiveUp, Job, Payload, job, job_types
from jobsys.errors import InvalidSubmission, JobStopped, UnknownJobType
from jobsys.job_types import JobType, Registry, encode, registry
from jobsys.jobs import settings
from jobsys.settings import Settings

TYPES = list(registry.load(Settings().job_modules).types.values())
"""Those that ship, and those of JOB_MODULES."""

each_type = pytest.mark.parametrize("job_type", TYPES, ids=lambda job_type: job_type.name)


class Note(Payload):
    text: str = "hello"


def keep(payload: Note, job: Job) -> dict[str, Any]:
    """Keep a note."""
    return {"text": payload.text, "attempt": job.attempt}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty registry in the place of the process's own."""
    fresh = Registry()
    monkeypatch.setattr(job_types, "registry", fresh)
    return fresh


# --- what every job type keeps to


@pytest.fixture
def surroundings(mail: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What jobs need around them: a mail server, a directory for output."""
    for name, value in {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(mail.port), "OUTPUT_DIR": str(tmp_path / "output")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("INGEST_URL", raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


@each_type
def test_the_example_is_a_valid_payload_and_is_kept_as_it_is(job_type: JobType) -> None:
    assert job_type.example.items() <= json.loads(job_type.check(job_type.example)).items()


@each_type
def test_running_the_example_gives_a_result_that_is_json(job_type: JobType, surroundings: None) -> None:
    encode(job_type.run(json.dumps(job_type.example), Job(type=job_type.name)))


@each_type
def test_the_function_says_in_a_line_what_it_does(job_type: JobType) -> None:
    assert job_type.function.__doc__ and 5 <= len(job_type.summary) <= 120


@each_type
def test_a_payload_that_is_no_object_is_refused(job_type: JobType) -> None:
    no_object: Any
    for no_object in (None, [], "text", 5):
        with pytest.raises(InvalidSubmission) as refusal:
            job_type.check(no_object)
        assert refusal.value.errors[0]["loc"] == ["payload"]


@pytest.mark.parametrize(
    "job_type", [each for each in TYPES if each.payload.model_config.get("extra") == "forbid"], ids=lambda job_type: job_type.name
)
def test_an_unknown_field_is_refused_and_named(job_type: JobType) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        job_type.check({**job_type.example, "surprise": 1})
    assert [error["loc"] for error in refusal.value.errors] == [["payload", "surprise"]]


# --- finding them


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, "EMAIL_SEND") for name in ("EMAIL_SEND", "email_send", "sendEmail", "SENDEMAIL", "email")),
        *((name, "CSV_EXPORT") for name in ("csvExport", "csv")),
        *((name, "INGEST_BATCH") for name in ("INGEST_BATCH", "ingestBatch")),
        *((name, "TEST_JOB") for name in ("Test_Job", "testJob", "test")),
    ],
)
def test_a_type_is_found_by_its_name_and_aliases_whatever_their_case(name: str, found: str) -> None:
    assert registry.find(name).name == found


@pytest.mark.parametrize("name", ["", "NOPE", "__class__", "jobsys.jobs.email", "os.system", "EMAIL_SEND "])
def test_an_unknown_type_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(UnknownJobType, match=r"is not one of .*CSV_EXPORT, .*EMAIL_SEND, .*TEST_JOB") as refusal:
        registry.find(name)
    assert refusal.value.errors[0]["loc"] == ["type"]


def test_a_type_that_is_declared_in_a_module_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Registry) -> None:
    (tmp_path / "my_own_jobs.py").write_text(
        "from jobsys import Job, Payload, job\n\n"
        "class Greeting(Payload):\n    name: str\n\n"
        '@job("GREET", aliases=["greet-someone"], max_retries=5, time_limit="2m", example={"name": "Ada"})\n'
        'def greet(payload: Greeting, job: Job) -> str:\n    """Greet someone."""\n    return f"Hello {payload.name}"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        greet = fresh.load(["my_own_jobs"]).find("Greet-Someone")
    finally:
        sys.modules.pop("my_own_jobs", None)
    assert (greet.name, greet.summary, greet.max_retries, greet.time_limit) == ("GREET", "Greet someone.", 5, 120.0)
    assert greet.run('{"name": "Ada"}', Job()) == "Hello Ada"


def test_a_name_that_is_taken_is_refused_and_the_owner_keeps_all(fresh: Registry) -> None:
    def other(payload: Note, job: Job) -> None:
        """Another."""

    job("NOTE", aliases=["memo"])(keep)
    for name, aliases in (("Memo", []), ("OTHER", ["other", "note"])):
        with pytest.raises(ValueError, match=r'the name ".*" of .*other is taken by job type NOTE in .*keep'):
            job(name, aliases=aliases)(other)
    assert fresh.find("memo").function is fresh.find("note").function is keep
    assert list(fresh.types) == ["NOTE"]
    job("OTHER")(other)
    assert fresh.find("other").function is other


def test_declaring_the_same_function_again_replaces_it(fresh: Registry) -> None:
    job("NOTE", queue="first")(keep)
    job("NOTE", queue="second")(keep)
    assert fresh.find("note").queue == "second"


# --- declaring one


def test_only_the_name_is_required_and_the_function_stays_a_function(fresh: Registry) -> None:
    declared = job("NOTE")(keep)
    assert declared is keep and declared(Note(text="hi"), Job(attempt=2)) == {"text": "hi", "attempt": 2}
    note = fresh.find("note")
    assert (note.queue, note.priority, note.max_retries, note.time_limit, note.example) == ("default", "default", None, 600.0, {})


@pytest.mark.parametrize(
    ("declaration", "complaint"),
    [
        ({"priority": "urgent"}, 'priority "urgent" of job type NOTE is not one of high, default, low'),
        ({"time_limit": "soon"}, '"soon" is not a duration'),
        ({"time_limit": -1}, "is not a duration"),
        ({"time_limit": 0}, "time_limit of job type NOTE must be longer than nothing"),
        ({"max_retries": -1}, "max_retries of job type NOTE must be 0 or more, not -1"),
        ({"name": ""}, '"" of job type'),
        ({"name": "two words"}, "is not a letter followed by"),
        ({"name": "x" * 101}, "is not a letter followed by"),
        ({"queue": "no queue!"}, '"no queue!" of job type NOTE is not a letter followed by'),
        ({"aliases": ["ok", "a/b"]}, '"a/b" of job type NOTE'),
        ({"example": {"text": 5}}, r"the example of job type NOTE does not validate: example\.text: Input should be a valid string"),
        ({"example": {"texts": "x"}}, r"example\.texts: Extra inputs are not permitted"),
        ({"example": {"text": "\0"}}, "NUL"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused_with_the_reason(fresh: Registry, declaration: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        job(**{"name": "NOTE", **declaration})(keep)
    assert fresh.types == {}


def no_job(payload: Note) -> None: ...
def no_hint(payload, job): ...  # type: ignore[no-untyped-def]
def no_payload(payload: dict, job: Job) -> None: ...  # type: ignore[type-arg]
def unknown(payload: Nowhere, job: Job) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def later(payload: Note, job: Job) -> None: ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (no_job, r"job type NOTE: no_job must be written as def no_job\(payload: SomePayload, job: Job\)"),
        (no_hint, "must be written as"),
        (no_payload, "must be written as"),
        (unknown, "job type NOTE: .*'Nowhere' is not defined"),
        (later, "job type NOTE: later must be an ordinary function, not an async one"),
    ],
)
def test_a_function_that_is_no_job_function_is_refused(fresh: Registry, function: Callable[..., Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        job("NOTE")(function)
    assert fresh.types == {}


# --- payloads


def test_a_wrong_field_is_named_by_its_place(fresh: Registry) -> None:
    job("NOTE")(keep)
    with pytest.raises(InvalidSubmission, match=r"payload\.text: Input should be a valid string") as refusal:
        fresh.find("note").check({"text": 5})
    assert refusal.value.errors == [{"loc": ["payload", "text"], "msg": "Input should be a valid string"}]


def test_of_very_many_wrong_fields_some_are_named(fresh: Registry) -> None:
    job("NOTE")(keep)
    with pytest.raises(InvalidSubmission) as refusal:
        fresh.find("note").check({f"surprise {n}": n for n in range(10_000)})
    assert 10 <= len(refusal.value.errors) <= 100


@pytest.mark.parametrize(
    "text", ["\0", "a\0b", "\ud800", float("nan"), float("inf"), -float("inf"), object(), b"\xff", {1, object()}, {"\0": 1}, {("a",): 1}]
)
def test_what_the_table_cannot_hold_is_refused_at_the_door(text: Any) -> None:
    for value in (text, [text], {"deep": [{"er": text}]}):
        with pytest.raises(InvalidSubmission) as refusal:
            encode(value, ("payload",))
        assert refusal.value.errors[0]["loc"] == ["payload"]


def test_nesting_without_end_is_refused_at_the_door() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidSubmission):
        encode(value)


@pytest.mark.parametrize("value", ["\\u0000", "\\\\u0000", "ok\u2028", "🎉", {"a": [1, 2.5, None, True]}, 2**70])
def test_what_the_table_can_hold_passes_unchanged(value: Any) -> None:
    assert json.loads(encode(value)) == value


def test_the_worker_validates_again(fresh: Registry) -> None:
    job("NOTE")(keep)
    with pytest.raises(ValidationError):
        fresh.find("note").run('{"text": 5}', Job())


# --- TEST_JOB


def run_test(payload: dict[str, Any], job: Job | None = None) -> Any:
    return registry.find("test").run(json.dumps(payload), job or Job())


@pytest.mark.parametrize("payload", [{}, {"sleepMs": 0, "anything": {"at": ["all", None]}}, {"failTimes": 0, "progressSteps": 2}])
def test_the_test_job_gives_its_payload_back(payload: dict[str, Any]) -> None:
    assert run_test(payload) == payload


def test_the_test_job_reports_progress_in_steps_over_its_sleep() -> None:
    job = Job()
    started = time.monotonic()
    run_test({"sleepMs": 120, "progressSteps": 3}, job)
    assert 0.12 <= time.monotonic() - started < 1
    assert job.lines == ["step 1 of 3 done", "step 2 of 3 done", "step 3 of 3 done"] and job.fraction == 1


def test_the_test_job_fails_in_as_many_attempts_as_it_is_told() -> None:
    payload = {"failTimes": 2, "failWith": "no luck"}
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="no luck"):
            run_test(payload, Job(attempt=attempt))
    assert run_test(payload, Job(attempt=3)) == payload
    with pytest.raises(RuntimeError, match="told to fail"):
        run_test({"failTimes": 1})


def test_the_test_job_gives_up_when_it_is_told() -> None:
    with pytest.raises(GiveUp, match="hopeless"):
        run_test({"giveUp": True, "failWith": "hopeless"}, Job(attempt=7))


def test_the_test_job_stops_in_the_middle_of_its_sleep() -> None:
    class StoppedSoon(Job):
        def checkpoint(self) -> None:
            if time.monotonic() - started > 0.1:
                self.stop_reason = "cancelled"
            super().checkpoint()

    started = time.monotonic()
    with pytest.raises(JobStopped, match="cancelled"):
        run_test({"sleepMs": 60_000}, StoppedSoon())
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"sleepMs": 3_600_001}, {"sleepMs": -1}, {"sleepMs": "5"}, {"sleepMs": True}, {"failTimes": -1}, {"failTimes": 1001}),
        *({"failWith": 5}, {"failWith": "x" * 1001}, {"progressSteps": 1001}, {"progressSteps": 1.5}, {"giveUp": 1}),
    ],
)
def test_the_test_job_refuses_what_is_out_of_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSubmission) as refusal:
        registry.find("test").check(wrong)
    assert refusal.value.errors[0]["loc"] == ["payload", *wrong]
