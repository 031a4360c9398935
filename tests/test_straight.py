"""An attempt goes through Dramatiq's thread straight where nobody could tell the difference, and else as Dramatiq has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from conftest import eventually, execute
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.worker import _WorkerThread

from jobsys import Job, Payload
from jobsys.job_types import JobType, Registry
from jobsys.presence import Presence
from jobsys.system import JobSystem

Work = Callable[[], object]


@pytest.fixture
def dramatiqs_way(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages that went Dramatiq's way."""
    went: list[Any] = []
    process = _WorkerThread.process_message

    def noted(thread: Any, message: Any) -> None:
        went.append(message)
        process(thread, message)

    monkeypatch.setattr(_WorkerThread, "process_message", noted)
    return went


@pytest.fixture
def threads(system: JobSystem) -> Iterator[Callable[[], None]]:
    """Starts Dramatiq's threads in this process."""
    workers: list[dramatiq.Worker] = []

    def start() -> None:
        workers.append(dramatiq.Worker(system.broker, worker_threads=2, worker_timeout=100))
        workers[0].start()

    yield start
    for worker in workers:
        worker.stop()


def run(system: JobSystem, function: Work) -> str:
    """Submit a job that does this, and is tried once; its id."""

    def do(payload: Payload, job: Job) -> object:
        return function()

    job_type = JobType(name=f"DO_{id(do)}", function=do, payload=Payload, max_retries=0)
    registry = Registry()
    registry.add(job_type)
    system.broker.declare_job_types(registry)
    [(job_id,)] = execute(
        str(system.settings.database_url), "insert into jobs (type, max_attempts) values (%s, 1) returning id", job_type.name
    )
    return str(job_id)


def test_an_attempt_that_succeeds_goes_straight(system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any]) -> None:
    threads()
    id = run(system, lambda: {"seen": system.broker.running.attempt if system.broker.running else None})
    eventually(lambda: system.job(id).status == "COMPLETED")
    assert system.job(id).result == {"seen": 1}
    assert dramatiqs_way == []


def test_one_that_raises_goes_on_as_dramatiq_has_it_and_has_run_once(
    system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    ran: list[str] = []
    begun: list[str] = []
    begin = Presence.begin
    monkeypatch.setattr(Presence, "begin", lambda presence, job: begun.append(job.message_id) or begin(presence, job))

    def fail() -> None:
        ran.append("once")
        raise ValueError("no")

    threads()
    id = run(system, fail)
    eventually(lambda: system.job(id).status == "FAILED")
    assert ran == ["once"] and [message.message_id for message in dramatiqs_way] == [id]
    [(told,)] = execute(database_url, "select traceback from failures where job_id = %s", id)
    assert told.count("File ") == 2 and "in fail" in told, "the frames of the job's own function, and of it only"
    assert begun == [id], "it began once"


def test_skipping_in_the_middle_of_a_function_does_not_count_as_success(system: JobSystem, threads: Callable[[], None]) -> None:
    def skip() -> None:
        raise SkipMessage("not today")

    threads()
    id = run(system, skip)
    eventually(lambda: system.job(id).status == "FAILED")


@pytest.mark.parametrize("hook", ["before_process_message", "after_process_message", "before_ack", "after_ack"])
def test_whoever_listens_hears_of_every_attempt(
    system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any], hook: str
) -> None:
    heard: list[str] = []
    listener = type("Listener", (Middleware,), {hook: lambda self, broker, message, **more: heard.append(message.message_id)})
    threads()
    straight = run(system, lambda: None)
    eventually(lambda: system.job(straight).status == "COMPLETED")
    system.broker.add_middleware(listener())
    ids = [run(system, lambda: None) for _ in range(2)]
    eventually(lambda: sorted(heard) == sorted(ids))
    assert sorted(message.message_id for message in dramatiqs_way) == sorted(ids)


def test_a_hook_may_call_an_actor_when_an_attempt_has_failed_for_good(system: JobSystem, threads: Callable[[], None]) -> None:
    told: list[str] = []
    tell = dramatiq.actor(lambda id: told.append(id), actor_name="tell", broker=system.broker)
    listener = type("Listener", (Middleware,), {"after_nack": lambda self, broker, message: tell(message.message_id)})
    system.broker.add_middleware(listener())
    threads()

    def fail() -> None:
        raise ValueError("no")

    id = run(system, fail)
    eventually(lambda: told == [id])
    eventually(lambda: system.job(id).status == "FAILED")


def test_a_job_with_options_of_dramatiqs_does_not_go_straight(
    system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any], database_url: str
) -> None:
    id = system.submit("TEST_JOB").id
    execute(database_url, """update jobs set options = '{"max_age": 3600000}' where id = %s""", id)
    threads()
    eventually(lambda: system.job(id).status == "COMPLETED")
    assert [message.message_id for message in dramatiqs_way] == [id]


def test_a_running_job_is_all_that_a_message_of_dramatiqs_is(system: JobSystem, threads: Callable[[], None]) -> None:
    kept: list[Any] = []
    threads()
    id = run(system, lambda: kept.append(system.broker.running))
    eventually(lambda: system.job(id).status == "COMPLETED")
    [message] = kept
    assert message.asdict()["message_id"] == id and message.copy(options={"x": 1}).options["x"] == 1
    assert dramatiq.Message.decode(message.encode()).message_id == id
    assert len((message | message.copy()).messages) == 2
