"""Migrations while everything runs, and in all the ways that go wrong; and a backup that is restored."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import CHECKOUT, Launcher, Running, at_database, environment, eventually, execute
from test_queue import Worker, blocked, prepare

from jobsys import db, local, migrations
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission

MIGRATE = """
import sys
from pathlib import Path
from jobsys import cli, migrations
migrations.SQL, migrations.LOCK_TIMEOUT, migrations.PATIENCE = Path(sys.argv.pop(1)), float(sys.argv.pop(1)), float(sys.argv.pop(1))
cli.main()
"""
TABLES = ("jobs", "failures", "events", "workers", "queues", "job_types", "tallies", "tally_log")
NOTE = "alter table jobs add column note text;"
INDEX = "-- outside a transaction\ncreate index concurrently jobs_by_note on jobs (note) where note is not null;\n"
APPLIED = "select name from schema_versions where version > 1 order by version"
NOTED = "select count(*)::integer from pg_attribute where attrelid = 'jobs'::regclass and attname = 'note'"
INDEXED = "select indisvalid from pg_index where indexrelid = to_regclass('jobs_by_note')"


class Release:
    """A directory of SQL as a later release might bring it, and its `jobsys migrate`."""

    def __init__(self, directory: Path, launcher: Launcher, settings: Settings) -> None:
        self.directory = directory
        self.settings = settings
        self._launcher = launcher
        shutil.copytree(db.SQL, directory)

    def add(self, name: str, text: str) -> None:
        (self.directory / "migrations" / f"{name}.sql").write_text(text)

    def migrate(self, *options: str, url: str | None = None, lock_timeout: float = 0.6, patience: float = 60) -> Running:
        command = [sys.executable, "-c", MIGRATE, str(self.directory), str(lock_timeout), str(patience), "migrate", *options]
        overrides = {"DATABASE_URL": url} if url else {}
        return self._launcher.start("migrate", command, environment(self.settings, **overrides))


@pytest.fixture
def release(tmp_path: Path, launcher: Launcher, settings: Settings) -> Release:
    return Release(tmp_path / "sql", launcher, settings)


@pytest.fixture
def empty_url(server: str, database_url: str) -> Iterator[str]:
    """The address of a database that has nothing in it."""
    name = f"{database_url.split('?')[0].rpartition('/')[2]}_empty"
    execute(server, f'create database "{name}"')
    yield at_database(server, name)
    execute(server, f'drop database "{name}" with (force)')


@pytest.fixture
def session(database_url: str) -> Iterator[Callable[[str], Any]]:
    """`session(statement)`: a transaction of somebody else that has run it, and stays open."""
    with contextlib.ExitStack() as sessions:

        def begin(statement: str) -> Any:
            connection = psycopg2.connect(database_url, application_name="somebody else")
            sessions.callback(connection.close)
            connection.cursor().execute(statement)
            return connection

        yield begin


def backends(url: str, query: str) -> list[int]:
    """The sessions of `jobsys migrate` that are at a statement like this."""
    found = execute(
        url,
        "select pid from pg_stat_activity where application_name = 'jobsys migrate' and state = 'active' and query ilike %s"
        " and datname = current_database()",
        f"%{query}%",
    )
    return [pid for (pid,) in found]


def described(url: str) -> list[tuple[Any, ...]]:
    """Everything about a schema that a program can notice."""
    return execute(
        url,
        """
        select 'column', attrelid::regclass::text, attname::text, format_type(atttypid, atttypmod), attnotnull::text,
            (select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = attrelid and adnum = attnum)
        from pg_attribute join pg_class on pg_class.oid = attrelid
        where relnamespace = 'public'::regnamespace and attnum > 0 and not attisdropped
        union all
        select 'relation', oid::regclass::text, relkind::text, reloptions::text, null, null
        from pg_class where relnamespace = 'public'::regnamespace
        union all
        select 'index', indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid::text, null, null
        from pg_index join pg_class on pg_class.oid = indexrelid where relnamespace = 'public'::regnamespace
        union all
        select 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid), null, null
        from pg_constraint where connamespace = 'public'::regnamespace
        union all
        select 'function', oid::regprocedure::text, pg_get_functiondef(oid), null, null, null
        from pg_proc where pronamespace = 'public'::regnamespace
        union all
        select 'trigger', tgrelid::regclass::text, pg_get_triggerdef(oid), null, null, null from pg_trigger where not tgisinternal
        union all
        select 'value', enumtypid::regtype::text, enumlabel::text, enumsortorder::text, null, null from pg_enum
        union all
        select 'version', version::text, name, sha256, null, null from schema_versions
        order by 1, 2, 3
        """,
    )


def assert_sums_agree(url: str) -> None:
    """The counters say what the table says."""
    counted = {
        row[:3]: row[3] - row[4] for row in execute(url, db.STATEMENTS["counts"]) if row[2] not in ("CREATED", "RETRIED", "WORKERS_LOST")
    }
    there = {row[:3]: row[3] for row in execute(url, "select queue, type, status::text, count(*) from jobs group by 1, 2, 3")}
    assert {key: n for key, n in counted.items() if n} == there


class Client(threading.Thread):
    """Submits one job after the other until it is stopped."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.system = JobSystem(settings)
        self.ids: list[str] = []
        self.error: Exception | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            for n in itertools.count():
                if self.stopped.wait(0.005):
                    return
                self.ids.append(self.system.submit("TEST_JOB", {"failTimes": int(n % 20 == 0)}).id)
        except Exception as error:
            self.error = error
        finally:
            self.system.close()

    def submits(self, more: int) -> None:
        """Wait until it has submitted so many more."""
        target = len(self.ids) + more
        eventually(lambda: self.error or len(self.ids) >= target, timeout=30)
        assert self.error is None


def test_a_migration_under_load_loses_nothing_and_makes_nobody_wait_for_long(
    release: Release, settings: Settings, start_worker: Any, session: Any, database_url: str, empty_url: str
) -> None:
    # Whoever waits longer than this fails: more than a migration's lock timeout, less than the transaction in the way lasts.
    hasty = f"{database_url}{'&' if '?' in database_url else '?'}options=-clock_timeout%3D5s"
    workers = [start_worker(DATABASE_URL=hasty), start_worker(DATABASE_URL=hasty)]
    client = Client(settings.model_copy(update={"database_url": hasty}))
    client.start()
    try:
        client.submits(20)
        for number, table in enumerate(TABLES, 2):
            release.add(f"{number:04}_note_in_{table}", f"alter table {table} add column note text;")
        release.add("0010_index", INDEX)
        reader = session("select 1 from jobs limit 1")
        migrating = release.migrate()
        eventually(lambda: f"0002_note_in_jobs waits for session {reader.info.backend_pid} (somebody else, idle in" in migrating.output, 30)
        client.submits(100)
        done = "select count(*) from jobs where status = 'COMPLETED'"
        [(before,)] = execute(database_url, done)
        eventually(lambda: execute(database_url, done)[0][0] > before + 50, timeout=30)
        assert execute(database_url, APPLIED) == []
        reader.rollback()
        reader = session("set transaction isolation level repeatable read; select 1")  # `concurrently` waits for its end, nothing else does
        eventually(lambda: f"0010_index waits for session {reader.info.backend_pid}" in migrating.output, 30)
        client.submits(50)
        reader.rollback()
        assert migrating.wait() == 0, migrating.output
        client.submits(20)
    finally:
        client.stopped.set()
        client.join()
    assert client.error is None
    ended = "select status::text, attempt, count(*)::integer from jobs where id = any(%s::uuid[]) group by 1, 2"
    failing = len(range(0, len(client.ids), 20))
    expected = {("COMPLETED", 1, len(client.ids) - failing), ("COMPLETED", 2, failing)}
    eventually(lambda: set(execute(database_url, ended, client.ids)) == expected, timeout=30)
    assert_sums_agree(database_url)
    for worker in workers:
        assert worker.stop() == 0
        # That outcomes waited, while the migration waited for its lock, it may say.
        assert not re.search(r"unexpected|structure of query|database is away", worker.output), worker.output

    assert release.migrate(url=empty_url).wait() == 0
    assert described(database_url) == described(empty_url)
    assert migrations.plan(database_url).unknown[-1] == "0010_index", "the old program sees that the schema is newer"


def test_what_the_old_release_says_is_still_understood(release: Release, database_url: str, system: JobSystem) -> None:
    for number, table in enumerate(TABLES, 2):
        release.add(f"{number:04}_{table}", f"alter table {table} add column note text, add column notes integer not null default 7;")
    assert release.migrate().wait() == 0
    for name in db.STATEMENTS:
        prepare(database_url, name)
    worker = Worker(system.database)
    jobs = [system.submit("TEST_JOB") for _ in range(3)]
    done, failed, given_back = worker.claim(3)
    assert worker.finish(done) and worker.fail(failed) and worker.release(given_back)
    system.cancel(jobs[2].id)
    assert_sums_agree(database_url)


def test_several_at_once_apply_each_migration_once(release: Release, empty_url: str) -> None:
    release.add("0002_note", NOTE)
    release.add("0003_index", INDEX)
    release.add("0004_slowly", "create table elsewhere (); select pg_sleep(0.5);")
    started = [release.migrate(url=empty_url) for _ in range(3)]
    assert [each.wait() for each in started] == [0] * 3, [each.output for each in started]
    said = " ".join(each.output for each in started)
    assert Counter(re.findall(r"schema(?=,|$| )|\b000\d_\w+", " ".join(re.findall("applied (.*)", said)))) == Counter(
        ["schema", "0002_note", "0003_index", "0004_slowly"]
    )
    assert execute(empty_url, INDEXED) == [(True,)]


def test_a_killed_migration_leaves_nothing_and_locks_nobody_out(release: Release, system: JobSystem, database_url: str) -> None:
    release.add("0002_note", f"{NOTE} select pg_sleep(600);")
    for end in ("program", "session"):
        migrating = release.migrate()
        [pid] = eventually(lambda: backends(database_url, "pg_sleep(600)"), 30)
        if end == "program":
            migrating.signal(signal.SIGKILL)
            migrating.wait()
        else:
            execute(database_url, "select pg_terminate_backend(%s)", pid)
            assert migrating.wait() == 1
            assert re.fullmatch(r"jobsys: 0002_note failed: (terminating connection|server closed).*\n", migrating.output)
        eventually(lambda: not backends(database_url, ""), 30)
        assert execute(database_url, APPLIED) == [] and execute(database_url, NOTED) == [(0,)]
        system.submit("TEST_JOB")
    release.add("0002_note", NOTE)
    assert release.migrate().wait() == 0
    assert execute(database_url, APPLIED) == [("0002_note",)] and execute(database_url, NOTED) == [(1,)]


@pytest.mark.parametrize("end", ["program", "session"])
def test_an_index_whose_building_was_cut_off_is_built_anew(
    release: Release, system: JobSystem, database_url: str, session: Any, end: str
) -> None:
    release.add("0002_note", NOTE)
    assert release.migrate().wait() == 0
    release.add("0003_index", INDEX)
    system.submit("TEST_JOB")
    writer = session("update jobs set progress = '1'")
    migrating = release.migrate()
    [pid] = eventually(lambda: backends(database_url, "create index concurrently"), 30)
    eventually(lambda: execute(database_url, INDEXED) == [(False,)] and blocked(database_url, pid))
    if end == "program":
        migrating.signal(signal.SIGKILL)
        migrating.wait()
        again = release.migrate()  # while PostgreSQL is still at what the first one wanted
        eventually(lambda: f"0003_index waits for session {writer.info.backend_pid}" in again.output, 30)
        system.submit("TEST_JOB")
        writer.rollback()
    else:
        execute(database_url, "select pg_terminate_backend(%s)", pid)
        assert migrating.wait() == 1
        assert re.search(r"^jobsys: 0003_index failed: (terminating connection|server closed)", migrating.output, re.MULTILINE)
        assert execute(database_url, INDEXED) == [(False,)]
        writer.rollback()
        again = release.migrate()
    assert again.wait() == 0, again.output
    assert execute(database_url, INDEXED) == [(True,)]
    assert execute(database_url, APPLIED) == [("0002_note",), ("0003_index",)]


def test_an_index_that_was_built_and_not_recorded_is_recorded(release: Release, database_url: str) -> None:
    execute(database_url, NOTE)
    execute(database_url, INDEX)
    built = execute(database_url, "select 'jobs_by_note'::regclass::oid")
    release.add("0002_index", INDEX)
    assert release.migrate().wait() == 0
    assert execute(database_url, APPLIED) == [("0002_index",)]
    assert execute(database_url, "select 'jobs_by_note'::regclass::oid") == built, "it is not built again"


@pytest.mark.parametrize(("name", "text"), [("0002_note", NOTE), ("0002_index", INDEX.replace("note", "type"))])
def test_a_transaction_that_stays_in_the_way_is_named(
    release: Release, system: JobSystem, database_url: str, session: Any, name: str, text: str
) -> None:
    release.add(name, text)
    fresh = described(database_url)
    somebody = session('lock table jobs in row exclusive mode; select 1 as "their own business"')
    migrating = release.migrate(lock_timeout=0.8, patience=2)
    assert migrating.wait() == 1
    complaint = migrating.output.splitlines()[-1]
    pid = somebody.info.backend_pid
    assert f"{name} was held up for 2 s by session {pid} (somebody else, idle in transaction, in its transaction for " in complaint
    assert "their own business" in complaint and f"pg_terminate_backend({pid})" in complaint
    assert complaint.startswith("jobsys: ") and "Traceback" not in migrating.output
    assert execute(database_url, APPLIED) == []
    left = [row for row in described(database_url) if "jobs_by_type" not in str(row)]
    assert left == fresh
    system.submit("TEST_JOB")
    execute(database_url, "select pg_terminate_backend(%s)", pid)
    assert release.migrate().wait() == 0
    assert execute(database_url, APPLIED) == [(name,)]
    assert execute(database_url, "select 1 from pg_index where not indisvalid") == []


def test_a_migration_that_is_wrong_is_named_and_leaves_nothing(release: Release, database_url: str) -> None:
    release.add("0002_note", NOTE)
    release.add("0003_wrong", "create table elsewhere (); alter table nowhere add column note text;")
    wrong = release.migrate()
    assert wrong.wait() == 1
    assert wrong.output == 'jobsys: 0003_wrong failed: relation "nowhere" does not exist\n'
    assert execute(database_url, APPLIED) == [("0002_note",)] and execute(database_url, "select to_regclass('elsewhere')") == [(None,)]


def test_a_file_that_was_applied_stays_as_it_is(release: Release, database_url: str) -> None:
    release.add("0002_note", NOTE)
    assert release.migrate().wait() == 0
    release.add("0002_note", NOTE.replace("text", "integer"))
    release.add("0003_index", INDEX)
    for options in ([], ["--dry-run"]):
        changed = release.migrate(*options)
        assert changed.wait() == 1
        assert changed.output.startswith("jobsys: 0002_note.sql has changed since it was applied") and "put the file back" in changed.output
    assert execute(database_url, APPLIED) == [("0002_note",)]


@pytest.mark.parametrize("older", ["alter table schema_versions drop column sha256", "update schema_versions set sha256 = 'another'"])
def test_a_database_of_before_the_first_release_says_what_to_do(release: Release, database_url: str, older: str) -> None:
    execute(database_url, older)
    release.add("0002_note", NOTE)
    refused = release.migrate()
    assert refused.wait() == 1
    assert "made from another schema.sql" in refused.output and "start with an empty database" in refused.output
    assert execute(database_url, NOTED) == [(0,)]


def test_a_newer_database_is_left_alone_and_old_workers_work(
    release: Release, launcher: Launcher, settings: Settings, system: JobSystem, start_worker: Any, database_url: str
) -> None:
    release.add("0002_note", NOTE)
    assert release.migrate().wait() == 0
    before = described(database_url)
    for options in ([], ["--dry-run"]):
        old = launcher.start("old", [sys.executable, "-m", "jobsys", "migrate", *options], environment(settings))
        assert old.wait() == 0
        assert old.output == "nothing was changed: the schema is newer than this jobsys, it has 0002_note\n"
    assert described(database_url) == before
    start_worker()
    assert system.wait(system.submit("TEST_JOB").id, 20).status == "COMPLETED"

    (release.directory / "migrations" / "0002_note.sql").rename(release.directory / "migrations" / "0003_other.sql")
    apart = release.migrate()
    assert apart.wait() == 1
    assert "the database has 0002_note, which this jobsys doesn't know, and lacks 0003_other" in apart.output


def test_a_dry_run_says_what_it_would_do_and_does_nothing(release: Release, empty_url: str) -> None:
    release.add("0002_note", NOTE)
    dry = release.migrate("--dry-run", url=empty_url)
    assert dry.wait() == 0 and dry.output == "would apply schema, 0002_note\n"
    assert execute(empty_url, "select 1 from pg_class where relnamespace = 'public'::regnamespace") == []
    wet = release.migrate(url=empty_url)
    assert wet.wait() == 0 and wet.output == "applied schema, 0002_note\n"
    dry = release.migrate("--dry-run", url=empty_url)
    assert dry.wait() == 0 and dry.output == "the schema is up to date\n"


def test_two_files_of_one_number_are_refused(release: Release, database_url: str) -> None:
    release.add("0002_note", NOTE)
    release.add("0002_index", INDEX)
    refused = release.migrate()
    assert refused.wait() == 1 and "0002_note can't come after 0002_index" in refused.output
    assert execute(database_url, APPLIED) == []


def client_programs(url: str) -> Path:
    """Where there is a pg_dump that understands this server."""
    [(server,)] = execute(url, "select current_setting('server_version_num')::integer / 10000")
    places = [Path(found).parent for found in [shutil.which("pg_dump")] if found]
    with contextlib.suppress(local.LocalError):
        places.append(local._binaries())
    for place in places:
        with contextlib.suppress(OSError):
            said = subprocess.run([place / "pg_dump", "--version"], capture_output=True, text=True).stdout
            if (version := re.search(r"\d+", said)) and int(version[0]) >= server:
                return place
    pytest.skip(f"there is no pg_dump of PostgreSQL {server} on this machine")


def test_a_backup_that_was_taken_under_load_is_restored_and_all_in_it_ends_once(
    settings: Settings, start_worker: Any, system: JobSystem, database_url: str, empty_url: str, tmp_path: Path
) -> None:
    programs, dump = client_programs(database_url), tmp_path / "jobs.dump"
    old_worker = start_worker()
    ended = [system.submit("TEST_JOB").id, system.submit("TEST_JOB", {"giveUp": True}).id]
    assert [system.wait(id, 20).status for id in ended] == ["COMPLETED", "FAILED"]
    system.submit("TEST_JOB", delay=5)
    later = system.submit("TEST_JOB", delay=3600).id
    client = Client(settings)
    client.start()
    try:
        system.submit_many([Submission("TEST_JOB", {"sleepMs": 600})] * 16)
        running, waiting = ("select 1 from jobs where status = 'PROCESSING'", "select 1 from jobs where status = 'PENDING'")
        eventually(lambda: len(execute(database_url, running)) >= 4 and len(execute(database_url, waiting)) >= 4, timeout=30)
        subprocess.run([programs / "pg_dump", "--format=custom", f"--file={dump}", database_url], check=True)
    finally:
        client.stopped.set()
        client.join()
    open_jobs = "select count(*) from jobs where status < 'COMPLETED'"
    eventually(lambda: execute(database_url, open_jobs) == [(1,)], timeout=60)
    assert old_worker.stop() == 0

    subprocess.run([programs / "pg_restore", "--no-owner", "--exit-on-error", f"--dbname={empty_url}", dump], check=True)
    assert migrations.migrate(empty_url) == [] and described(empty_url) == described(database_url)
    backup = dict(execute(empty_url, "select id::text, status::text from jobs"))
    assert set(backup.values()) == {"SCHEDULED", "PENDING", "PROCESSING", "COMPLETED", "FAILED"}
    [pause] = re.findall(r'psql "\$DATABASE_URL" -c "(.*)"', (CHECKOUT / "README.md").read_text())
    execute(empty_url, pause)
    start_worker(DATABASE_URL=empty_url)
    eventually(lambda: (len(execute(empty_url, running)), len(execute(empty_url, "select 1 from workers"))) == (0, 1), timeout=60)
    assert {id for id, status in backup.items() if status in ("COMPLETED", "FAILED")} == {
        id for (id,) in execute(empty_url, "select id::text from jobs where status >= 'COMPLETED'")
    }

    restored = JobSystem(settings.model_copy(update={"database_url": empty_url}))
    restored.resume("default")
    forgotten = execute(database_url, "select id::text, claim from jobs where id::text = any(%s)", [id for id in backup if id not in ended])
    late = {"id": [id for id, _ in forgotten], "claim": [claim for _, claim in forgotten], "result": ["0"] * len(forgotten)}

    heard: list[Any] = []

    def all_ended() -> bool:
        heard.extend(restored.database.run("finish", **late))  # a worker of the time before, over and over
        return execute(empty_url, open_jobs) == [(1,)]

    eventually(all_ended, timeout=60)
    restored.close()
    assert heard == []
    now = {id: (status, attempt) for id, status, attempt in execute(empty_url, "select id::text, status::text, attempt from jobs")}
    failing = {id for (id,) in execute(empty_url, "select job_id::text from failures where type <> 'WorkerLost'")}
    for id, status in backup.items():
        runs = 0 if id == later else 1 + (status == "PROCESSING") + (id in failing and id not in ended)
        assert now[id] == ("SCHEDULED" if id == later else "FAILED" if id == ended[1] else "COMPLETED", runs)
    assert execute(empty_url, "select id::text, finished_at from jobs where id::text = any(%s) order by id", ended) == execute(
        database_url, "select id::text, finished_at from jobs where id::text = any(%s) order by id", ended
    )
    assert_sums_agree(empty_url)
    completions = [row[3:] for row in execute(empty_url, db.STATEMENTS["counts"]) if row[2] == "COMPLETED"]
    assert completions == [(sum(status == "COMPLETED" for status, _ in now.values()), 0)]
