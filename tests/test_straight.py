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


class Listener(Middleware):
    """Hears of what every middleware may hear of an attempt."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def before_process_message(self, broker: Any, message: Any) -> None:
        self.heard.append("before_process_message")

    def after_process_message(self, broker: Any, message: Any, *, result: Any = None, exception: Any = None) -> None:
        self.heard.append(f"after_process_message {type(exception).__name__}")

    def before_ack(self, broker: Any, message: Any) -> None:
        self.heard.append("before_ack")

    def after_ack(self, broker: Any, message: Any) -> None:
        self.heard.append("after_ack")


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
    system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any], database_url: str
) -> None:
    ran: list[str] = []

    def fail() -> None:
        ran.append("once")
        raise ValueError("no")

    threads()
    id = run(system, fail)
    eventually(lambda: system.job(id).status == "FAILED")
    assert ran == ["once"] and [message.message_id for message in dramatiqs_way] == [id]
    [(told,)] = execute(database_url, "select traceback from failures where job_id = %s", id)
    assert told.count("File ") == 2 and "in fail" in told, "the frames of the job's own function, and of it only"
    waits = system.broker.measurements.take()["job_wait_seconds", (dramatiqs_way[0].actor_name, "default")]
    assert sum(waits.buckets) == 1, "it began once"


def test_skipping_in_the_middle_of_a_function_does_not_count_as_success(system: JobSystem, threads: Callable[[], None]) -> None:
    def skip() -> None:
        raise SkipMessage("not today")

    threads()
    id = run(system, skip)
    eventually(lambda: system.job(id).status == "FAILED")


def test_whoever_listens_hears_of_every_attempt(system: JobSystem, threads: Callable[[], None], dramatiqs_way: list[Any]) -> None:
    threads()
    straight = run(system, lambda: None)
    eventually(lambda: system.job(straight).status == "COMPLETED")
    listener = Listener()
    system.broker.add_middleware(listener)
    heard = run(system, lambda: None)
    eventually(lambda: system.job(heard).status == "COMPLETED")
    eventually(lambda: listener.heard == ["before_process_message", "after_process_message NoneType", "before_ack", "after_ack"])
    assert [message.message_id for message in dramatiqs_way] == [heard]


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
