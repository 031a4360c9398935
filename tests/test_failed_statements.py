"""Every statement a worker runs, failed on purpose, before and after its commit, with each kind of error: each job still reaches its one
end.

A few installations, each with a database and a worker process of its own, try one failure after the other; failing.py makes statements
fail. With FAILED_STATEMENTS=all in the environment each statement meets every kind of error at both moments, three times in a row; else it
loses its connection at both moments and meets one of the other kinds, once.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from conftest import CHECKOUT, Launcher, Running, at_database, environment, eventually, execute
from dramatiq.message import Message

from jobsys import db
from jobsys.ids import new_job_id
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission

ALL = os.environ.get("FAILED_STATEMENTS") == "all"
KINDS = ("operational", "interface", "data", "pool", "timeout")
MOMENTS = ("before", "after")
TIMES = dict.fromkeys(KINDS, 3 if ALL else 1) | {"data": 1}
"""How often in a row. An outcome that PostgreSQL refuses twice, itself and as a failure, is given up."""
PLANTS = 3
HERE = Path(__file__).parent

ELSEWHERE = {
    *db.load_statements("doctor.sql"),
    *("completed", "count_requests", "now", "matching", "take", "statuses"),
    *("revocations", "revoke", "came_in_before", "login_wait", "lock_logins", "count_login", "login_succeeded"),
    *("unfinished_jobs", "stirred_jobs", "timeline"),
}
"""What `jobsys doctor` asks; a job that calls complete_in twice, and the rate limit, on connections of their own; an operator's verb for
many; the doors; and those who wait for jobs, who are not answered with 503 at once."""
NEVER_RUN_BY_WORKERS = {
    *(
        "jobs",
        "end_of_part",
        "group",
        "failures",
        "events",
        "cancel",
        "requeue",
        "bury_job",
        "remove",
        "pause_queue",
        "resume_queue",
        "wake_queue",
    ),
    *("queue_settings", "oldest_due", "counts", "workers", "stream", "drop_waiting", "unfinished", "result"),
    *("measurements", "pools", "waits", "worker_strength", "longest_transaction"),
    *ELSEWHERE,
}
"""What only the API, the admin UI and clients run. Every other statement is made to fail in a worker, and has to be run there for that."""
STATEMENTS = sorted({*db.STATEMENTS, "listen", "commit"} - NEVER_RUN_BY_WORKERS)

SAID = {"parent": 1, "flaky": 2, "failed": 2, "suspect": 1}
"""How many lines the jobs log that log any, by label."""
UNSTORABLE = "the outcome of this attempt can't be stored"


def arm(faults: Path, *fault: Any) -> None:
    """Have a statement fail: failing.py says how."""
    new = faults.with_suffix(".new")
    new.write_text(json.dumps(fault))
    new.replace(faults)


def strikes(faults: Path, number: int) -> int:
    """How often a fault has struck."""
    file = Path(f"{faults}.struck")
    return sum(line.split()[0] == str(number) for line in file.read_text().splitlines()) if file.exists() else 0


class Plant:
    """One installation whose worker's statements can be failed."""

    def __init__(self, directory: Path, url: str) -> None:
        self.url = url
        self.faults = directory / "faults"
        self.directory = directory
        self.settings = Settings(
            _env_file=None,
            database_url=url,
            output_dir=directory,
            worker_processes=1,
            worker_threads=6,
            retry_min_backoff="50ms",
            retry_max_backoff="100ms",
            worker_heartbeat="200ms",
            worker_lost_after="30s",
            poll_interval="200ms",
            shutdown_grace="5s",
            job_modules=["failing"],
        )
        self.numbers = itertools.count(1)

    def start(self) -> None:
        """Have a worker on an empty database."""
        self.system = JobSystem(self.settings)
        self.ask("truncate jobs, failures, events, workers, job_types, queues, tallies, tally_log")
        env = environment(self.settings, FAULTS=self.faults, PYTHONPATH=f"{CHECKOUT}{os.pathsep}{HERE}", dramatiq_restart_delay="100")
        self.launcher = Launcher(self.directory)
        self.worker = self.launcher.start("worker", [sys.executable, "-m", "jobsys", "worker"], env)
        eventually(lambda: self.ask("select name from job_types"), timeout=30)
        self.system.limit("paced", rate=(20, 1), max_running=2)
        self.threads = eventually(lambda: (seen := self.inspected()["threads"])["_WorkerThread"] == 6 and seen)
        [(self.types,)] = self.ask("select count(*) from job_types")

    def close(self) -> None:
        self.faults.unlink(missing_ok=True)
        self.launcher.close()
        self.system.close()

    def ask(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows; nothing of this process's is made to fail."""
        with self.system.database.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def id(self) -> str | None:
        """The living worker's."""
        rows = self.ask("select id::text from workers where heartbeat_at > now() - interval '5s' order by started_at desc limit 1")
        return rows[0][0] if rows else None

    @property
    def child(self) -> psutil.Process:
        """The worker process itself, below its supervisor."""
        return eventually(lambda: next(iter(psutil.Process(self.worker.pid).children()), None))

    def fail(self, statement: str, when: str, kind: str) -> None:
        self.number = next(self.numbers)
        arm(self.faults, self.number, statement, when, kind, TIMES[kind])

    @property
    def struck(self) -> int:
        return strikes(self.faults, self.number)

    def inspected(self) -> dict[str, Any]:
        """What the worker has in memory."""
        [(id,)] = self.ask("insert into jobs (type) values ('INSPECT') returning id::text")
        done = self.system.wait(id, 20)
        assert done.status == "COMPLETED", f"the worker does not claim: {done}"
        return done.result


@pytest.fixture(scope="module")
def plants(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Plant]]:
    plants = []
    for number in range(PLANTS):
        name = f"{template}_{number}"
        execute(server, f'create database "{name}" template "{template}"')
        plants.append(Plant(tmp_path_factory.mktemp("plant"), at_database(server, name)))
    try:
        with ThreadPoolExecutor(PLANTS) as threads:
            list(threads.map(Plant.start, plants))
        yield plants
    finally:
        with ThreadPoolExecutor(PLANTS) as threads:
            closing = [threads.submit(plant.close) for plant in plants]
        for number in range(PLANTS):
            execute(server, f'drop database "{template}_{number}" with (force)')
    for each in closing:
        each.result()


class Round:
    """Some jobs that together make a worker run every statement, and what must become of each: `expected` has, by label, the status, the
    attempt it ends with, and how often it is started and reaches its end."""

    def __init__(self, plant: Plant, name: str, kind: str) -> None:
        self.plant = plant
        self.kind = kind
        self.ledger = plant.directory / f"{name}.ledger"
        self.ledger.touch()
        self.expected: dict[str, tuple[str | None, int, int, int]] = {}
        self.crowds = 0

    def payload(self, label: str, **more: Any) -> dict[str, Any]:
        return {"ledger": str(self.ledger), "label": label, **more}

    def expect(self, label: str, status: str | None, attempt: int = 1, starts: int = 1, ends: int = 1) -> str:
        self.expected[label] = (status, attempt, starts, ends)
        return label

    def begin(self) -> None:
        """Two jobs run, that are to be cancelled and removed."""
        self.long = [
            self.plant.system.submit("LEDGER", self.payload(self.expect(label, status, ends=0), seconds=60)).id
            for label, status in (("cancelled", "CANCELLED"), ("removed", None))
        ]
        eventually(lambda: self.ledger.read_text().count("start") == 2, timeout=20)

    def submit(self) -> None:
        """All the others, and the requests to stop those that run."""
        system, submit, gone = self.plant.system, self.plant.system.submit, new_job_id()
        system.cancel(self.long[0])
        system.remove(self.long[1])
        submit("SCRIPT", self.payload(self.expect("parent", "COMPLETED"), child=self.expect("child", "COMPLETED")))
        submit("SCRIPT", self.payload(self.expect("flaky", "COMPLETED", 2, 2), failures=1))
        submit("SCRIPT", self.payload(self.expect("failed", "FAILED", 2, 2, 0), failures=9), max_retries=1)
        submit("HOPELESS", self.payload(self.expect("hopeless", "FAILED", ends=0)))
        submit("LEDGER", self.payload(self.expect("delayed", "COMPLETED")), delay=0.1)
        for n in range(3):
            submit("PACED", self.payload(self.expect(f"paced {n}", "COMPLETED")))
        self.crowd()
        second = self.message("second", on_success="note_success")
        for after in ("after first", "after second"):  # their payloads name no ledger
            self.expect(after, None)
        system.broker.enqueue(self.message("first", pipe_target=second.asdict(), on_success="note_success"))
        self.plant.ask(
            """
            insert into workers values (%s, 'gone', 1, '', '{}', '{}', 1, default, '-infinity', '1s', '1s', 1, '-infinity')
            """,
            gone,
        )
        for label, worker, attempt in (("unheld", self.plant.id, 1), ("rescued", gone, 2), ("orphan", new_job_id(), 2)):
            self.expect(label, "COMPLETED", attempt)
            self.insert(label, status="PROCESSING", attempt=1, claim=1, worker=worker, started_at="-infinity")
        self.expect("suspect", "COMPLETED", 3)
        self.insert("suspect", type="SCRIPT", payload=json.dumps(self.payload("suspect", alone=True)), attempt=2, crashes=2)
        self.expect("old", None, starts=0, ends=0)
        long_ago = {"id": f"016f5e66-e800-7000-8000-{secrets.token_hex(6)}", "created_at": "2020-01-01", "finished_at": "2020-01-01"}
        self.insert("old", status="COMPLETED", **long_ago)

    def crowd(self) -> None:
        """More jobs than threads, in no time."""
        self.crowds += 1
        labels = [self.expect(f"crowd {self.crowds}.{n}", "COMPLETED") for n in range(60)]
        self.plant.system.submit_many(Submission("LEDGER", self.payload(label)) for label in labels)

    def insert(self, label: str, **columns: Any) -> None:
        columns = {"type": "LEDGER", "payload": json.dumps(self.payload(label))} | columns
        values = ", ".join(["%s"] * len(columns))
        self.plant.ask(f"insert into jobs ({', '.join(columns)}) values ({values})", *columns.values())

    def message(self, label: str, **options: Any) -> Message[Any]:
        self.expect(label, "COMPLETED")
        return Message("plain", "note_down", (), {"ledger": str(self.ledger), "label": label}, options, message_id=new_job_id())

    def complaints(self) -> list[str]:
        """What is not as it must be once everything has settled."""
        jobs = "from jobs where payload->>'ledger' = %s"
        found: defaultdict[str, list[Any]] = defaultdict(list)
        for label, status, attempt, error in self.plant.ask(
            f"select payload->>'label', status, attempt, error->>'message' {jobs}", str(self.ledger)
        ):
            found[label].append((status, attempt, error))
        lines = Counter(line.rsplit(" ", 3)[0] for line in self.ledger.read_text().splitlines())
        events = self.plant.ask(
            f"select payload->>'label' from events join (select * {jobs}) as jobs on job_id = id where kind = 'log'", str(self.ledger)
        )
        logged = Counter(label for (label,) in events)
        said = [f"{label}: {logged[label]} lines instead of {n}" for label, n in SAID.items() if logged[label] < n and self.kind != "data"]
        # What PostgreSQL refuses is itself at fault: that is recorded, and nothing follows.
        refused = {label for label in found for *_, error in found[label] if self.kind == "data" and UNSTORABLE in (error or "")}
        refused |= {"second", "after first"} if "first" in refused else set()
        refused |= {"after second"} if "second" in refused else set()
        for label, (status, attempt, starts, ends) in self.expected.items():
            if label in refused:
                continue
            if [now[:2] for now in found[label]] != ([(status, attempt)] if status else []):
                said.append(f"{label}: {found[label]} instead of {status} with attempt {attempt}")
            if (lines[f"start {label}"], lines[f"end {label}"]) != (starts, ends):
                said.append(f"{label}: {lines[f'start {label}']} starts and {lines[f'end {label}']} ends instead of {starts} and {ends}")
        return said

    def settled(self) -> bool:
        """Whether all is as it must be, also in the worker's memory and in its row."""
        assert (said := self.complaints()) == [], "; ".join(said[:8])
        now = self.plant.inspected()
        nothing = {"held": [], "running": [], "expected": 0, "unwritten": 0, "suspect": None, "connections": 0}
        assert now == nothing | {"threads": self.plant.threads}, str(now)
        assert self.plant.ask("select count(*) from job_types") == [(self.plant.types,)]
        rows = self.plant.ask("select queues <@ asleep, busy_above, occupied, suspect from workers")
        assert rows == [(True, None, False, None)], f"it waits otherwise than its row says: {rows}"
        return True


def endure(plant: Plant, statement: str, when: str, kind: str) -> str:
    """Fail the statement while a worker does all it can; what is wrong after that, or ''."""
    round = Round(plant, f"{statement}-{when}-{kind}", kind)
    before, after = PROVOKED.get(statement, (None, None))
    try:
        if before is not None:
            plant.fail(statement, when, kind)
            before(plant)
        round.begin()
        if before is None:
            plant.fail(statement, when, kind)
        round.submit()
        if after is not None:
            after(round)
        began = time.monotonic()

        def struck() -> bool:
            waited = time.monotonic() - began
            if not plant.struck and not before and not after and waited > 2 * round.crowds:
                round.crowd()
            return plant.struck >= (TIMES[kind] if waited < 4 else 1)

        eventually(struck, timeout=30)
        plant.faults.unlink()
        eventually(round.settled, timeout=20, interval=0.1)
        counted = {status: n for status, n in plant.system.counts().items() if n}
        assert counted == dict(plant.ask("select status, count(*)::integer from jobs group by 1"))
    except AssertionError as error:
        plant.close()
        plant.start()
        return f"{statement} {when} {kind}, which struck {plant.struck} times: {error}"
    finally:
        plant.faults.unlink(missing_ok=True)
    return ""


def declare_lost(plant: Plant) -> None:
    plant.ask("delete from job_types")
    plant.ask("delete from workers")
    eventually(lambda: plant.id)


def cut_heart(round: Round) -> None:
    hearts = "application_name = 'jobsys heart' and datname = current_database()"
    round.plant.ask(f"select pg_terminate_backend(pid) from pg_stat_activity where {hearts}")


def restart(round: Round) -> None:
    end(round, signal.SIGTERM, starts=1)


def kill(round: Round) -> None:
    end(round, signal.SIGKILL, starts=2)


def lock_a_job(round: Round) -> None:
    """Somebody has a job's row when it ends, and for some seconds more."""
    job = round.plant.system.submit("LEDGER", round.payload(round.expect("locked", "COMPLETED"), seconds=0.5))
    eventually(lambda: "start locked" in round.ledger.read_text())
    holder = psycopg2.connect(round.plant.url)
    holder.cursor().execute("select from jobs where id = %s for update", [job.id])
    threading.Timer(5, holder.close).start()


def keep_the_turn(round: Round) -> None:
    """Somebody's large claim hangs, until the worker has looked whether one does."""
    with contextlib.closing(psycopg2.connect(round.plant.url)) as hanging:
        hanging.cursor().execute("select take_turn('default', true)")
        deadline = time.monotonic() + 20
        while not round.plant.struck and time.monotonic() < deadline:
            round.crowd()
            time.sleep(0.5)


def occupy(round: Round) -> None:
    """Every thread gets a job that takes a while, of which it was told, and then the process is told of more."""
    deadline = time.monotonic() + 20
    while not round.plant.struck and time.monotonic() < deadline:
        eventually(lambda: not round.complaints(), timeout=20)
        eventually(lambda: round.plant.ask("select id from workers where queues <@ asleep"), timeout=20)
        for _ in range(12):
            label = round.expect(f"slow {len(round.expected)}", "COMPLETED")
            round.plant.system.submit("LEDGER", round.payload(label, seconds=0.5))


def end(round: Round, how: signal.Signals, starts: int) -> None:
    """End the worker process while a job runs."""
    eventually(lambda: not round.complaints(), timeout=20)
    round.plant.system.submit("LEDGER", round.payload(round.expect("last", "COMPLETED", starts, starts), seconds=0.3))
    eventually(lambda: "start last" in round.ledger.read_text())
    round.plant.child.send_signal(how)


PROVOKED: dict[str, tuple[Callable[[Plant], None] | None, Callable[[Round], None] | None]] = {
    "register_worker": (declare_lost, None),
    "declare_types": (declare_lost, None),
    "listen": (None, cut_heart),
    "set_limits": (None, restart),
    "unregister_worker": (None, restart),
    "forget_pools": (None, restart),
    "free": (None, lock_a_job),
    "report_death": (None, kill),
    "turn_hangs": (None, keep_the_turn),
    "be_occupied": (None, occupy),
    "pass_on": (None, occupy),
    "leave_in_peace": (None, restart),
}
"""What makes a worker run the statements that it runs only now and then."""


def chosen(statement: str) -> list[tuple[str, str]]:
    """(moment, kind) that a statement is tried with."""
    possible = [(when, kind) for kind in KINDS for when in MOMENTS if (when, kind) != ("after", "pool")]
    number = STATEMENTS.index(statement)
    return possible if ALL else [*possible[:2], possible[2 + number % len(possible[2:])]]


def test_what_workers_run_is_not_among_what_they_never_run() -> None:
    assert NEVER_RUN_BY_WORKERS.issubset(db.STATEMENTS)
    for module in ("chores", "claims", "heart", "lookout", "outcomes", "presence", "settlements", "worker"):
        source = (CHECKOUT / "jobsys" / f"{module}.py").read_text()
        assert not [name for name in NEVER_RUN_BY_WORKERS if re.search(rf'run\([\w., ]*"{name}"', source)], module


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_that_fails_costs_no_job_its_one_end(plants: list[Plant], statement: str) -> None:
    free: queue.SimpleQueue[Plant] = queue.SimpleQueue()
    for plant in plants:
        free.put(plant)

    def endure_one(failure: tuple[str, str]) -> str:
        plant = free.get()
        try:
            return endure(plant, statement, *failure)
        finally:
            free.put(plant)

    with ThreadPoolExecutor(len(plants)) as threads:
        complaints = [said for said in threads.map(endure_one, chosen(statement)) if said]
    assert not complaints, "\n".join(complaints)


# The other side: what submits and asks.


class Web:
    """A web server whose statements can be failed."""

    def __init__(self, start: Callable[..., Running], faults: Path) -> None:
        self.faults = faults
        self.number = itertools.count(1)
        web = start(WEB_PROCESSES=1, JOB_MODULES="failing", FAULTS=faults, PYTHONPATH=f"{CHECKOUT}{os.pathsep}{HERE}")
        self.port = int(web.url.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None, accept: str = "*/*") -> tuple[int, Any]:
        """The status and the document of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        accepted = "text/plain" if path == "/metrics" else "*/*"
        headers = {"Content-Type": "application/json", "Accept": accepted} | ({"Idempotency-Key": key} if key else {})
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if "json" in (answer.headers["Content-Type"] or "") else text

    @contextlib.contextmanager
    def failing(self, statement: str, when: str, kind: str) -> Iterator[None]:
        number = next(self.number)
        arm(self.faults, number, statement, when, kind, 1)
        yield
        assert strikes(self.faults, number) == 1, f"{statement} was not run"


@pytest.fixture
def web(start_web: Callable[..., Running], tmp_path: Path) -> Web:
    return Web(start_web, tmp_path / "faults")


AWAY = [(when, kind) for when in MOMENTS for kind in KINDS if kind != "data" and (when, kind) != ("after", "pool")]


def test_a_submission_that_fails_is_answered_so_and_happened_at_most_once(web: Web, database_url: str) -> None:
    def jobs() -> int:
        return int(execute(database_url, "select count(*) from jobs")[0][0])

    submit = ("POST", "/jobs", {"type": "TEST_JOB", "payload": {"n": 1}})
    few, many = ({"ids": list(range(1, n))} for n in (10, 1000))
    for statement, request, made in (
        ("submit_one", submit, 1),
        ("submit", ("POST", "/api/ingest", few), 3),
        ("submit_many", ("POST", "/jobs", {"type": "TEST_JOB", "delay": 60}), 1),
        ("commit", ("POST", "/api/ingest", few), 3),
        ("stream", ("POST", "/api/ingest", many), 333),
        ("commit", ("POST", "/api/ingest", many), 333),
    ):
        for when, kind in [*AWAY, ("before", "data")]:
            there = jobs()
            with web.failing(statement, when, kind):
                status, _ = web.ask(*request)
            assert status == 503 or (kind == "data" and status in (422, 500)), (statement, when, kind, status)
            assert jobs() - there == (made if when == "after" else 0), (statement, when, kind)
            assert web.ask(*request)[0] in (201, 202)


def test_a_submission_with_a_key_that_is_repeated_until_it_is_answered_makes_one_job(web: Web, database_url: str) -> None:
    for when, kind in [*AWAY, ("before", "data"), ("after", "data")]:
        for statement in ("submit_many", "find_idempotent", "job"):
            key = f"{statement} {when} {kind}"
            request = ("POST", "/jobs", {"type": "TEST_JOB"}, key)
            first = None if statement == "submit_many" else web.ask(*request)[1]["jobId"]
            with web.failing(statement, when, kind):
                assert web.ask(*request)[0] in ((503,) if kind != "data" else (422, 500)), key
            again = web.ask(*request)[1]["jobId"]
            assert first in (None, again)
            assert execute(database_url, "select id::text from jobs where idempotency_key = %s", key) == [(again,)]


ASKED = {
    "job": ("GET", "/jobs/{id}"),
    "jobs": ("GET", "/jobs"),
    "group": ("GET", "/api/status/{id}"),
    "failures": ("GET", "/jobs/{id}/events"),
    "events": ("GET", "/jobs/{id}/events"),
    "cancel": ("POST", "/jobs/{id}/cancel"),
    "requeue": ("POST", "/jobs/{id}/retry"),
    "bury_job": ("POST", "/admin/jobs/{id}/dlq"),
    "pause_queue": ("POST", "/admin/queues/default/pause"),
    "resume_queue": ("POST", "/admin/queues/default/resume"),
    "wake_queue": ("POST", "/admin/queues/default/resume"),
    "queue_settings": ("GET", "/health"),
    "oldest_due": ("GET", "/health"),
    "counts": ("GET", "/metrics"),
    "measurements": ("GET", "/metrics"),
    "pools": ("GET", "/metrics"),
    "waits": ("GET", "/metrics"),
    "worker_strength": ("GET", "/metrics"),
    "longest_transaction": ("GET", "/metrics"),
    "workers": ("GET", "/health"),
    "remove": ("DELETE", "/jobs/{id}"),
    **dict.fromkeys(("measurements", "pools", "waits", "worker_strength", "longest_transaction"), ("GET", "/metrics")),
}
"""A request that runs the statement."""


def test_a_request_whose_statement_fails_is_answered_with_503_and_the_next_one_is_served(web: Web, system: JobSystem) -> None:
    assert {*ASKED, "stream", "end_of_part", "drop_waiting", "unfinished", "result"} == NEVER_RUN_BY_WORKERS - ELSEWHERE | {"job"}, (
        "stream above; end_of_part comes when a search takes long, and is one query as the others; the rest is Dramatiq's interface"
    )
    job, _ = system.submit("TEST_JOB"), system.submit("TEST_JOB")
    for statement, (method, path) in ASKED.items():
        for when, kind in AWAY:
            with web.failing(statement, when, kind):
                accept = "*/*" if statement == "counts" else "text/plain, application/json;q=0.5"
                status, _ = web.ask(method, path.format(id=job.id), accept=accept)
            # (A search that takes too long is continued in parts.)
            assert status == 503 or (statement, kind, status) == ("jobs", "timeout", 200), (statement, when, kind)
            assert web.ask("GET", "/metrics")[0] == 200
