"""The doctor finds what is wrong: each finding is provoked for real, and its remedy, where it is a statement, cures."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from conftest import Launcher, Mailbox, environment, eventually, execute, free_port
from psycopg2 import extensions, extras
from test_cli import on_a_terminal
from test_queue import pile_up, touched

from jobsys import __version__, db, doctor, migrations
from jobsys.doctor import Finding, examine, span
from jobsys.ids import new_job_id
from jobsys.local import Postgres
from jobsys.settings import Settings
from jobsys.system import JobSystem, Submission


def look(settings: Settings, check: str, **changes: Any) -> list[Finding]:
    """What one check finds, with these settings changed."""
    with contextlib.closing(doctor.Doctor(settings.model_copy(update=changes))) as examination:
        found = doctor.told("database", examination.database)
        return found if check == "database" else doctor.told(check, getattr(examination, check))


def look_at_one(settings: Settings, check: str, **changes: Any) -> Finding:
    [finding] = look(settings, check, **changes)
    return finding


def is_well(settings: Settings, check: str, **changes: Any) -> bool:
    return {finding.level for finding in look(settings, check, **changes)} == {"ok"}


def cure(settings: Settings, finding: Finding) -> None:
    """Do what the remedy says, which is one statement."""
    execute(str(settings.database_url), finding.remedy.split(";")[0])


@contextlib.contextmanager
def another_session(url: str, *statements: str) -> Iterator[Any]:
    """A connection that has run these in a transaction, and does nothing more."""
    with contextlib.closing(psycopg2.connect(url, application_name="someone")) as connection:
        for statement in statements:
            connection.cursor().execute(statement)
        yield connection


def register(url: str, **changes: Any) -> str:
    """A row in `workers` as of a worker that lives; its id."""
    row = {
        "id": new_job_id(),
        "host": "web-1",
        "pid": 4711,
        "version": __version__,
        "queues": ["default"],
        "types": ["TEST_JOB"],
        "threads": 8,
        "heartbeat": "1 hour",
        "lost_after": "1 hour",
        "session_pid": 1,
        "session_start": "now",
    } | changes
    execute(url, f"insert into workers ({', '.join(row)}) values ({', '.join(['%s'] * len(row))})", *row.values())
    return str(row["id"])


def insert(url: str, **columns: Any) -> None:
    execute(url, f"insert into jobs ({', '.join(columns)}) values ({', '.join(['%s'] * len(columns))})", *columns.values())


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL as it should be, which the others here are not: they don't wait for the disk."""
    postgres = Postgres(tmp_path_factory.mktemp("own"))
    postgres.start()
    execute(postgres.url, "alter system set max_prepared_transactions = 2")
    postgres.stop()
    postgres.start()
    migrations.migrate(postgres.url)
    yield postgres
    postgres.stop()


# The whole


def test_a_healthy_installation_gets_a_clean_bill(own_server: Postgres, settings: Settings, launcher: Launcher) -> None:
    here = settings.model_copy(update={"database_url": own_server.url})
    launcher.start("worker", [sys.executable, "-m", "jobsys", "worker"], environment(here))
    eventually(lambda: is_well(here, "workers"), timeout=20)
    findings = examine(here)
    assert {finding.level for finding in findings} == {"ok"}, findings
    assert len(findings) == len({finding.check for finding in findings}) == 18
    assert not any(finding.remedy for finding in findings)
    code, screen = on_a_terminal(here, "doctor")
    assert code == 0 and screen.count("✓") == 18 and "all is well" in screen


def test_problems_come_last_on_a_terminal_and_the_status_says_so(settings: Settings) -> None:
    execute(str(settings.database_url), "insert into jobs (type, queue) select 'TEST_JOB', 'queue' || n from generate_series(1, 7) n")
    code, screen = on_a_terminal(settings, "doctor")
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in screen.splitlines()]
    assert code == 1 and lines[0].startswith("✓ database") and "problem" in lines[-1]
    assert "✗ workers        no worker is running" in lines and lines[lines.index("✗ workers        no worker is running") + 1].endswith(
        "→ jobsys worker"
    )
    assert sum("no living worker serves" in line for line in lines) == 5 and any("… and 2 more" in line for line in lines)
    assert max(map(len, (line for line in lines if "→" not in line))) <= 100


def test_a_pipe_gets_tabs_and_json_whoever_asks_for_it(settings: Settings) -> None:
    def say(*words: str) -> Any:
        command = [sys.executable, "-m", "jobsys", "doctor", *words]
        return subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=60)

    objects = json.loads((said := say("--json")).stdout)
    assert (
        said.returncode == 1
        and {"check": "workers", "level": "problem", "finding": "no worker is running", "remedy": "jobsys worker"} in objects
    )
    assert {each["level"] for each in objects} <= {"problem", "warning", "ok"} and all(
        set(each) == set(Finding._fields) for each in objects
    )
    assert "problem\tworkers\tno worker is running\tjobsys worker" in say().stdout.splitlines()


def test_one_check_that_fails_is_a_warning_and_stops_no_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    with another_session(str(settings.database_url), "lock table tally_log in access exclusive mode"):
        findings = {finding.check: finding for finding in examine(settings)}
    assert findings["counters"].level == "warning" and "canceling statement due to statement timeout" in findings["counters"].finding
    assert findings["schema"].level == findings["retention"].level == "ok" and len(findings) == 18


def test_what_may_not_be_read_is_a_warning(settings: Settings) -> None:
    url, role = str(settings.database_url), f"reader_{secrets.token_hex(4)}"
    execute(url, f"create role {role}")
    try:
        as_reader = extensions.make_dsn(url, options=f"-crole={role}")
        with another_session(url):
            findings = {finding.check: finding for finding in examine(settings.model_copy(update={"database_url": as_reader}))}
        assert findings["counters"].finding == "could not be checked: permission denied for table tally_log"
        assert findings["transactions"].remedy == f"grant pg_read_all_stats to {role};" and findings["schema"].level == "warning"
        assert findings["connections"].level == "ok"
    finally:
        execute(url, f"drop role {role}")


@pytest.mark.parametrize(
    "way",
    ["postgresql//bob:sec%%ret@h/d", "postgresql://bob:sec@ret@127.0.0.1/d", "postgresql://bob:sec/ret@127.0.0.1/d", "password='sec ret"],
)
def test_no_password_is_printed_however_the_address_is_spelt(settings: Settings, way: str) -> None:
    findings = examine(settings.model_copy(update={"database_url": way, "smtp_user": "bob", "smtp_password": "secret"}))
    assert findings[0].level == "problem" and "%40" in findings[0].remedy
    assert not re.search("sec|ret[^u]", json.dumps(findings))


def test_what_others_run_is_shown_without_its_values(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LONG_IDLE", 0)
    for literal in ("'secret'", "$$secret$$", "$a$secret$a$", "E'it\\'s secret'"):
        with another_session(str(settings.database_url), f"select 1,\n  {literal}"):
            assert re.search(r" after: select 1,( E)?…$", look_at_one(settings, "transactions").finding)


def test_it_costs_little_among_many_jobs(database_url: str) -> None:
    for _ in range(3):
        pile_up(database_url, "PENDING")
        pile_up(database_url, "COMPLETED", finished_at="now()")
    [(table,)] = execute(database_url, "select pg_relation_size('jobs') / 8192")
    with contextlib.closing(psycopg2.connect(database_url, options="-cenable_seqscan=off")) as connection:
        assert touched(connection, "due") < 60
        assert touched(connection, "heartbeats") < 60
        assert touched(connection, "abandoned") < 60
        assert touched(connection, "unprunable", days=30) < 60
        assert touched(connection, "unpruned", days=30) < 150
        assert touched(connection, "oldest_of_type", queue="default", type="NONE") < table / 2


# PostgreSQL


def test_a_database_that_is_not_there_is_one_problem(settings: Settings, server: str, closed_port: int) -> None:
    nowhere = f"postgresql://bob:secret@127.0.0.1:{closed_port}/jobs"
    findings = examine(settings.model_copy(update={"database_url": nowhere}))
    assert [finding.check for finding in findings] == ["database", "output", "mail"]
    assert (
        findings[0].level == "problem" and "Connection refused" in findings[0].finding and "pg_isready -h 127.0.0.1" in findings[0].remedy
    )
    missing = extensions.make_dsn(server, dbname="nope")
    assert "createdb" in look_at_one(settings, "database", database_url=missing).remedy
    assert look_at_one(
        settings, "database", database_url=None
    ).finding == "DATABASE_URL is not set, and no database of bin/dev is under " + str(settings.data_dir)


def test_a_standby_and_an_old_server_are_problems(own_server: Postgres, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = own_server.home / "data" / "standby.signal"
    own_server.stop()
    signal.touch()
    try:
        own_server.start()
        monkeypatch.setattr(doctor, "OLDEST_SERVER", 99)
        old, standby = look(settings, "server", database_url=own_server.url)
        assert "is too old, jobsys needs 99 or newer" in old.finding
        assert standby.level == "problem" and "is a standby" in standby.finding and "target_session_attrs=read-write" in standby.remedy
    finally:
        own_server.stop()
        signal.unlink()
        own_server.start()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("synchronous_commit", "off"), ("default_transaction_read_only", "on"), ("session_replication_role", "replica")],
)
def test_settings_that_weaken_the_promise_are_problems(own_server: Postgres, settings: Settings, setting: str, value: str) -> None:
    here = settings.model_copy(update={"database_url": own_server.url})
    execute(own_server.url, f"alter database jobsys set {setting} = {value}")
    finding = look_at_one(here, "safety")
    assert finding.level == "problem" and finding.finding.startswith(f"{setting} is {value}: ")
    assert f"alter database jobsys reset {setting};" in finding.remedy
    execute(own_server.url, finding.remedy)
    execute(own_server.url, f"alter role postgres in database jobsys set {setting} = {value}")
    finding = look_at_one(here, "safety")
    execute(own_server.url, finding.remedy)
    assert is_well(here, "safety")
    assert (
        "out of the options in DATABASE_URL"
        in look_at_one(here, "safety", database_url=f"{own_server.url}&options=-c{setting}%3D{value}").remedy
    )


def test_a_server_that_does_not_wait_for_the_disk_is_a_problem(own_server: Postgres, settings: Settings) -> None:
    [(fsync,)] = execute(str(settings.database_url), "show fsync")  # off at the server that most tests have
    assert fsync == "on" or look(settings, "safety")[0].finding.startswith("fsync is off: ")
    execute(own_server.url, "alter system set full_page_writes = off")
    execute(own_server.url, "select pg_reload_conf()")
    here = settings.model_copy(update={"database_url": own_server.url})
    finding = eventually(lambda: (found := look_at_one(here, "safety")).level == "problem" and found)
    assert finding.finding.startswith("full_page_writes is off: ")
    for statement in filter(None, finding.remedy.split(";")):
        execute(own_server.url, statement)
    eventually(lambda: is_well(here, "safety"))


def test_few_free_connections_are_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    [(name,)] = execute(str(settings.database_url), "select current_database()")
    execute(str(settings.database_url), f'alter database "{name}" connection limit 3')
    with another_session(str(settings.database_url)), another_session(str(settings.database_url)):
        finding = look_at_one(settings, "connections")
    assert finding.level == "warning" and finding.finding == f"database {name} has 3 of 3 connections in use"
    cure(settings, finding)
    assert is_well(settings, "connections")
    monkeypatch.setattr(doctor, "CROWDED", 0)
    assert any("the server has" in finding.finding and "max_connections" in finding.remedy for finding in look(settings, "connections"))


def test_a_clock_that_is_off_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 125)
    finding = look_at_one(settings, "clock")
    assert finding.level == "warning" and finding.finding.startswith("the clock of this machine is 2 min ahead of the database's")
    monkeypatch.undo()
    execute(
        str(settings.database_url),
        "do $$ begin execute format('alter database %I set timezone = ''Asia/Tokyo''', current_database()); end $$",
    )
    assert is_well(settings, "clock")


class TransactionPooler:
    """What a pooler in transaction mode does: each transaction gets whichever session of the server is free, and no notification passes."""

    def __init__(self, url: str) -> None:
        self._server = extensions.parse_dsn(url)
        self._free: queue.Queue[socket.socket] = queue.Queue()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = extensions.make_dsn(url, host="127.0.0.1", port=self._door.getsockname()[1])
        threading.Thread(target=self._let_in, daemon=True).start()

    def close(self) -> None:
        self._door.close()
        while not self._free.empty():
            self._free.get().close()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._door.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error), client:
            while (startup := _message(client, b""))[4:8] != struct.pack("!HH", 3, 0):
                client.sendall(b"N")  # no encryption
            session = self._connect()
            session.sendall(startup)
            while (answer := _message(session))[:1] != b"Z":
                client.sendall(answer)
                if answer[:1] == b"R" and struct.unpack("!I", answer[5:9])[0] in (3, 5, 10, 11):
                    session.sendall(_message(client))
            client.sendall(answer)
            self._free.put(session)
            while (request := _message(client))[:1] != b"X":
                session = self._free.get(timeout=10)
                session.sendall(request)
                while (answer := _message(session)) != b"Z\0\0\0\5I":
                    if answer[:1] != b"A":
                        client.sendall(answer)
                    if answer[:1] == b"Z":
                        session.sendall(_message(client))
                self._free.put(session)
                client.sendall(answer)

    def _connect(self) -> socket.socket:
        host, port = self._server["host"], int(self._server.get("port", 5432))
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        session = socket.socket(socket.AF_UNIX)
        session.connect(f"{host}/.s.PGSQL.{port}")
        return session


def _message(sender: socket.socket, kind: bytes | None = None) -> bytes:
    """The next message of PostgreSQL's protocol, whole; the first one of a client has no kind."""

    def exactly(size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = sender.recv(size - len(got))
            if not part:
                raise OSError("closed")
            got += part
        return got

    head = exactly(4) if kind == b"" else exactly(5)
    return head + exactly(struct.unpack("!I", head[-4:])[0] - 4)


def test_a_pooler_in_transaction_mode_is_noticed(settings: Settings) -> None:
    assert is_well(settings, "notifications")
    with contextlib.closing(TransactionPooler(str(settings.database_url))) as pooler:
        findings = examine(settings.model_copy(update={"database_url": pooler.url}))
    [finding] = [finding for finding in findings if finding.check == "notifications"]
    assert (
        finding.level == "warning"
        and "a pooler in transaction mode" in finding.finding
        and "a notification did not arrive" in finding.finding
    )
    assert "polling finds every job all the same, within POLL_INTERVAL (0.2 s here)" in finding.remedy
    assert not any("could not be checked" in finding.finding for finding in findings)


def test_old_snapshots_and_idle_transactions_are_warnings_with_their_owner(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(settings.database_url)
    with another_session(url, "set transaction isolation level repeatable read", "select count(*) from jobs") as connection:
        assert is_well(settings, "transactions")
        monkeypatch.setattr(doctor, "LONG_TRANSACTION", 0)
        execute(url, "insert into jobs (type) values ('TEST_JOB')")
        finding = look_at_one(settings, "transactions")
        assert finding.level == "warning" and finding.finding.startswith(f"session {connection.info.backend_pid} (someone, postgres")
        assert re.search(
            r"keeps all rows that died in the [1-9]\d* transactions since; it has been idle in transaction for 0 s after: ", finding.finding
        )
        assert finding.finding.endswith("select count(*) from jobs") and "idle_in_transaction_session_timeout" in finding.remedy
        cure(settings, finding)
        assert is_well(settings, "transactions")
    with another_session(url, "select 1"):
        assert is_well(settings, "transactions")
        monkeypatch.setattr(doctor, "LONG_IDLE", 0)
        assert "may keep locks; it has been idle in transaction" in look_at_one(settings, "transactions").finding


def test_a_prepared_transaction_that_nobody_ends_is_a_warning(
    own_server: Postgres, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = settings.model_copy(update={"database_url": own_server.url})
    with another_session(own_server.url, "select pg_current_xact_id()", "prepare transaction 'it''s old'"):
        pass
    assert is_well(here, "transactions")
    monkeypatch.setattr(doctor, "LONG_TRANSACTION", 0)
    finding = look_at_one(here, "transactions")
    assert finding.level == "warning" and "of postgres was prepared 0 s ago" in finding.finding
    assert finding.remedy.startswith("rollback prepared 'it''s old';")
    cure(here, finding)
    assert is_well(here, "transactions")


def test_a_replication_slot_that_holds_old_rows_is_a_warning(
    own_server: Postgres, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = settings.model_copy(update={"database_url": own_server.url})
    with (own_server.home / "hba.conf").open("a") as hba:
        hba.write("local replication all peer map=starter\n")
    execute(own_server.url, "select pg_reload_conf(), pg_create_physical_replication_slot('gone')")

    def connected() -> Any:
        with contextlib.suppress(psycopg2.OperationalError):
            return psycopg2.connect(own_server.url, connection_factory=extras.PhysicalReplicationConnection)

    with contextlib.closing(eventually(connected)) as standby:
        [(oldest, now)] = execute(
            own_server.url, "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, pg_current_wal_lsn()::text"
        )
        standby.cursor().start_replication(slot_name="gone", start_lsn=now)
        feedback = b"h" + struct.pack("!qIIII", 0, oldest, 0, 0, 0)
        os.write(standby.fileno(), b"d" + struct.pack("!I", len(feedback) + 4) + feedback)
        eventually(lambda: execute(own_server.url, "select 1 from pg_replication_slots where xmin is not null and active"))
        assert is_well(here, "transactions")
        monkeypatch.setattr(doctor, "MANY_TRANSACTIONS", -1)
        assert look(here, "transactions")[0].finding.startswith("replication slot gone keeps all rows")
        monkeypatch.undo()
    eventually(lambda: execute(own_server.url, "select 1 from pg_replication_slots where not active"))
    finding = look_at_one(here, "transactions")
    assert finding.level == "warning" and finding.finding.startswith("replication slot gone, which nobody reads, keeps all rows")
    cure(here, finding)
    assert is_well(here, "transactions")


def test_vacuum_that_does_not_keep_up_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(settings.database_url)
    assert is_well(settings, "vacuum")
    execute(url, "alter table jobs set (autovacuum_enabled = off)")
    finding = look_at_one(settings, "vacuum")
    assert finding.finding.startswith("autovacuum is off for jobs")
    monkeypatch.setattr(doctor, "MANY_DEAD_ROWS", 50)
    execute(url, "insert into jobs (type) select 'TEST_JOB' from generate_series(1, 100)")
    execute(url, "update jobs set priority = 1")
    dead = eventually(lambda: [each for each in look(settings, "vacuum") if "dead rows beside" in each.finding])[0]
    assert dead.level == "warning" and dead.finding == "jobs has 100 dead rows beside 100 live ones, never vacuumed"
    cure(settings, dead)
    cure(settings, finding)
    eventually(lambda: is_well(settings, "vacuum"))
    monkeypatch.setattr(doctor, "NEAR_WRAPAROUND", 0)
    assert look_at_one(settings, "vacuum").level == "warning"
    monkeypatch.setattr(doctor, "VERY_NEAR_WRAPAROUND", 0)
    assert look_at_one(settings, "vacuum").level == "problem"


def test_autovacuum_that_is_off_for_all_is_a_warning(own_server: Postgres, settings: Settings) -> None:
    here = settings.model_copy(update={"database_url": own_server.url})
    execute(own_server.url, "alter system set autovacuum = off")
    execute(own_server.url, "select pg_reload_conf()")
    finding = eventually(lambda: (found := look_at_one(here, "vacuum")).level == "warning" and found)
    assert (
        finding.finding.startswith("autovacuum is off: ")
        and finding.remedy == "alter system set autovacuum = 'on'; select pg_reload_conf();"
    )
    for statement in filter(None, finding.remedy.split(";")):
        execute(own_server.url, statement)
    eventually(lambda: is_well(here, "vacuum"))


# Our tables


def test_a_database_without_tables_is_to_be_migrated(settings: Settings, server: str) -> None:
    name = f"jobsys_doctor_{secrets.token_hex(4)}"
    execute(server, f"create database {name}")
    url = extensions.make_dsn(server, dbname=name)
    try:
        findings = examine(settings.model_copy(update={"database_url": url}))
        [finding] = [finding for finding in findings if finding.check == "migrations"]
        assert (finding.level, finding.finding, finding.remedy) == ("problem", "the database has no tables of jobsys", "jobsys migrate")
        assert not {"schema", "workers", "queues"} & {finding.check for finding in findings}
        execute(url, "create schema shop")
        migrations.migrate(extensions.make_dsn(url, options="-csearch_path=shop"))
        elsewhere, _ = look(settings, "migrations", database_url=url)
        assert elsewhere.remedy == "add to DATABASE_URL: ?options=-csearch_path%3Dshop"
        findings = examine(settings.model_copy(update={"database_url": extensions.make_dsn(url, options="-csearch_path=shop")}))
        assert {finding.level for finding in findings if finding.check in ("migrations", "schema", "vacuum", "queues")} == {"ok"}
    finally:
        execute(server, f"drop database {name} with (force)")


def test_a_migration_too_few_or_too_many_is_noticed(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max(migration.version for migration in migrations.known())
    shutil.copytree(db.SQL, tmp_path / "sql")
    (tmp_path / "sql" / "migrations").mkdir(exist_ok=True)
    (tmp_path / "sql" / "migrations" / f"{newest + 1:04}_colours.sql").write_text(
        "create table colours (name text);\ncreate index colourful on colours (name);\ndrop index jobs_retriable;\n"
        "alter index jobs_grouped\n    rename to jobs_of_a_group;\n"
    )
    monkeypatch.setattr(migrations, "SQL", tmp_path / "sql")
    finding = look_at_one(settings, "migrations")
    assert (
        finding.level == "problem"
        and finding.finding == f"1 migration not applied: {newest + 1:04}_colours"
        and finding.remedy == "jobsys migrate"
    )
    assert is_well(settings, "schema")
    migrations.migrate(str(settings.database_url))
    assert is_well(settings, "migrations") and is_well(settings, "schema")
    execute(str(settings.database_url), "drop index jobs_of_a_group")
    assert look_at_one(settings, "schema").finding == "index jobs_of_a_group is missing"
    monkeypatch.undo()
    finding = look_at_one(settings, "migrations")
    assert finding.level == "warning" and f"newer jobsys than this one, {__version__}" in finding.finding and "_colours" in finding.finding


def test_it_expects_whatever_the_migrations_make(database_url: str) -> None:
    """So that the list can't drift: what is there without being read from the files would be a way of writing SQL that is overlooked."""
    there = execute(
        database_url,
        """
        select case when relkind = 'r' then 'table' else 'index' end, relname from pg_class
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'i')
            and not exists (select from pg_constraint where conindid = pg_class.oid)
        union all select 'trigger', tgname from pg_trigger where not tgisinternal
        union all select 'function', proname from pg_proc where pronamespace = 'public'::regnamespace
        union all select 'type', typname from pg_type where typnamespace = 'public'::regnamespace and typtype = 'e'
        """,
    )
    assert {(each.kind, each.name) for each in doctor._objects()} == set(there)


@pytest.mark.parametrize(
    ("harm", "finding"),
    [
        ("drop index jobs_ready", "index jobs_ready is missing"),
        ("drop index jobs_idempotent", "index jobs_idempotent is missing"),
        ("update pg_index set indisvalid = false where indexrelid = 'jobs_ready'::regclass", "index jobs_ready is invalid"),
        ("alter table jobs disable trigger jobs_updated", "trigger jobs_updated is disabled"),
        ("drop trigger jobs_filled_in on jobs", "trigger jobs_filled_in is missing"),
        ("drop function finish_jobs", "function finish_jobs is missing"),
        ("drop table failures", "table failures is missing"),
    ],
)
def test_what_is_missing_or_out_of_order_in_the_schema_is_a_problem(settings: Settings, harm: str, finding: str) -> None:
    execute(str(settings.database_url), harm)
    found = look_at_one(settings, "schema")
    assert (found.level, found.finding) == ("problem", finding)
    if found.remedy.endswith(";"):
        cure(settings, found)
        assert is_well(settings, "schema")
    else:
        assert "backup" in found.remedy or "create function finish_jobs" in found.remedy


def test_silent_workers_and_workers_of_different_versions_are_noticed(settings: Settings) -> None:
    url = str(settings.database_url)
    dead = register(url, host="web-2", heartbeat="1 second", lost_after="30 seconds", heartbeat_at="now")
    execute(url, "update workers set heartbeat_at = now() - interval '3 minutes'")
    execute(url, "insert into jobs (type, status, worker, started_at) values ('TEST_JOB', 'PROCESSING', %s, now())", dead)
    silent, none = look(settings, "workers")
    assert (
        silent.level == "problem" and "worker web-2:4711 has been silent for 3 min, and is lost after 30 s; it has 1 job" in silent.finding
    )
    assert (none.level, none.finding) == ("problem", "no worker is alive")
    register(url)
    assert look_at_one(settings, "workers").level == "warning"
    execute(url, "update workers set heartbeat_at = '-infinity' where id = %s", dead)
    assert "was seen to die" in look_at_one(settings, "workers").finding
    execute(url, "delete from workers where id = %s", dead)
    assert is_well(settings, "workers")
    register(url, version="0.0.9", host="web-3")
    versions = look_at_one(settings, "workers")
    assert versions.level == "warning" and f"1 worker of 0.0.9 (web-3:4711), 1 worker of {__version__} (web-1:4711)" in versions.finding
    execute(url, "update workers set version = '0.0.9'")
    assert look_at_one(settings, "workers").finding == f"all workers are of version 0.0.9, and this is jobsys {__version__}"


def test_jobs_that_no_living_worker_takes_are_problems(settings: Settings) -> None:
    url = str(settings.database_url)
    insert(url, type="TEST_JOB", run_at="2020-01-01")
    due = "now() - interval '3 hours 5 minutes'"
    execute(url, f"insert into jobs (type, queue, run_at) select 'SHRINK', 'pictures', {due} from generate_series(1, 3)")
    default, pictures = look(settings, "queues")
    assert default.level == pictures.level == "problem" and default.remedy == "jobsys worker"
    assert pictures.finding == "no living worker serves queue pictures, where 3 due jobs (SHRINK) wait, the oldest for 3 h 5 min"
    register(url)
    slow, pictures = look(settings, "queues")
    assert slow.level == "warning" and "queue default has 1 due job, and the oldest has waited for" in slow.finding
    assert pictures.level == "problem" and "JOB_MODULES that declares SHRINK" in pictures.remedy
    register(url, queues=["pictures"], types=["GROW"])
    register(url, queues=["default"], types=["SHRINK"])
    _, unknown = look(settings, "queues")
    assert unknown.level == "problem"
    assert unknown.finding == "no living worker of queue pictures knows the type SHRINK, of which 3 due jobs wait, the oldest for 3 h 5 min"
    execute(url, "update workers set queues = '{default,pictures}', types = '{SHRINK,TEST_JOB}'")
    execute(url, "update jobs set run_at = now()")
    assert is_well(settings, "queues")
    execute(url, "update workers set held_back = '{SHRINK}'")
    assert look_at_one(settings, "queues").finding.startswith("SHRINK, of which 3 due jobs wait, is held back")


def test_queues_that_are_paused_or_at_their_limit_with_jobs_waiting_are_warnings(settings: Settings, system: JobSystem) -> None:
    system.submit_many([Submission("TEST_JOB") for _ in range(3)])
    register(str(settings.database_url))
    system.pause("default")
    finding = look_at_one(settings, "limits")
    assert finding.level == "warning" and finding.finding.startswith("queue default is paused, and 3 due jobs wait, the oldest for ")
    subprocess.run([sys.executable, "-m", *finding.remedy.split()], env=environment(settings), check=True)
    assert is_well(settings, "limits")
    worker = register(str(settings.database_url))
    execute(
        str(settings.database_url),
        "update jobs set status = 'PROCESSING', worker = %s, started_at = now() where id in (select id from jobs limit 1)",
        worker,
    )
    system.limit("default", rate=(10, 60.0), max_running=1)
    finding = look_at_one(settings, "limits")
    assert finding.finding.startswith("queue default is at its limit, 1 of 1 running, and 2 due jobs wait")
    assert finding.remedy == "jobsys limit default --rate 10/60s --max-running 2"
    system.limit("default", rate=(1, 3600.0), max_running=2)
    finding = look_at_one(settings, "limits")
    assert "starts 1 per 1 h, and 2 due jobs wait" in finding.finding and finding.finding.endswith("they need 2 h")
    assert finding.remedy == "jobsys limit default --rate 2/3600s --max-running 2"


def test_running_jobs_of_workers_that_are_not_there_are_noticed(settings: Settings) -> None:
    url = str(settings.database_url)
    insert(url, type="TEST_JOB", status="PROCESSING", worker=new_job_id(), started_at="now")
    finding = look_at_one(settings, "running")
    assert finding.level == "problem" and finding.finding.startswith("1 job PROCESSING at 1 worker not there any more, for up to")
    register(url)
    assert look_at_one(settings, "running").level == "warning"


def test_old_jobs_that_nobody_prunes_are_warnings(settings: Settings) -> None:
    url = str(settings.database_url)
    then = "now() - interval '40 days'"
    old = f"insert into jobs (id, type, status, created_at, finished_at) values (%s, 'X', 'COMPLETED', {then}, {then})"
    execute(url, old, "0190a2b4-0000-7000-8000-000000000000")
    finding = look_at_one(settings, "retention")
    assert (
        finding.level == "warning"
        and finding.finding == "1 of the first 100 jobs are past RETENTION_DAYS (30): the oldest ended 40 days ago"
    )
    assert is_well(settings, "retention", retention_days=50) and is_well(settings, "retention", retention_days=0)
    execute(url, "delete from jobs")
    insert(url, type="TEST_JOB")
    execute(url, old, "d3b07384-d9a0-4c1e-8b8a-9b1c2d3e4f50")
    [row] = JobSystem(settings).database.run("prune", after="00000000-0000-0000-0000-000000000000", days=30)
    assert row[2] == 0
    finding = next(each for each in look(settings, "retention") if "version 7" in each.finding)
    assert finding.level == "warning" and finding.finding.startswith("1 jobs past RETENTION_DAYS (30) are never removed")
    cure(settings, finding)
    assert is_well(settings, "retention") and execute(url, "select count(*) from jobs") == [(1,)]


def test_a_log_of_counts_that_nobody_sums_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LARGE_LOG", 10)
    for _ in range(11):
        insert(str(settings.database_url), type="TEST_JOB")
    finding = look_at_one(settings, "counters")
    assert finding.level == "warning" and finding.finding.startswith("tally_log has more than 10 rows")
    JobSystem(settings).database.run("sum_tallies")
    assert is_well(settings, "counters")


# This machine


def test_files_that_can_not_be_written_are_problems(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_well(settings, "output") and not settings.output_dir.exists()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/jobsys/output")):
        finding = look_at_one(settings, "output", output_dir=place)
        assert finding.level == "problem" and f"OUTPUT_DIR {place} can't be written to: " in finding.finding
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1.1)
    assert look_at_one(settings, "output").level == "warning" and "GiB are free" in look_at_one(settings, "output").finding
    monkeypatch.setattr(doctor, "NO_SPACE", 1.1)
    assert look_at_one(settings, "output").level == "problem"


def test_a_mail_server_that_can_not_be_used_is_a_problem(settings: Settings, mail: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_well(settings, "mail") and is_well(settings, "mail", smtp_host="127.0.0.1", smtp_port=mail.port)
    port = free_port()
    finding = look_at_one(settings, "mail", smtp_host="127.0.0.1", smtp_port=port)
    assert (
        finding.level == "problem"
        and f"mail server 127.0.0.1:{port} can't be used: " in finding.finding
        and f"nc -vz 127.0.0.1 {port}" in finding.remedy
    )
    server = {"smtp_host": "127.0.0.1", "smtp_port": mail.port}
    assert "STARTTLS" in look_at_one(settings, "mail", **server, smtp_tls="starttls").finding
    assert look_at_one(settings, "mail", **server, smtp_user="bob").finding.endswith("offers no login, and SMTP_USER is set")
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out" in look_at_one(settings, "mail", smtp_host="127.0.0.1", smtp_port=mute.getsockname()[1]).finding


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (3600, "1 h"), (11_100, "3 h 5 min"), (86_400, "1 day"), (187_200, "2 days 4 h")],
)
def test_a_length_of_time_is_told_in_two_units(seconds: float, words: str) -> None:
    assert span(seconds) == words
