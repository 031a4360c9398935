"""What is wrong with this installation, with numbers, and what to do about it.

Each check looks at one thing, changes nothing, and yields findings; a finding that all is well counts only when its check has no other.
Checks know nothing of each other: one that fails becomes a warning. No statement takes longer than `PATIENCE`. What other sessions run is
shown up to its first literal only, because that may be a password.
"""

from __future__ import annotations

import re
import select
import shlex
import shutil
import smtplib
import ssl
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import extensions

from jobsys import __version__, db, job_types, migrations
from jobsys.errors import DatabaseUnavailable, SettingsError
from jobsys.ids import new_job_id
from jobsys.settings import Settings

PATIENCE = 5.0
"""Seconds one statement, one connection, or one answer of the mail server may take."""
OLDEST_SERVER = 14
LONG_TRANSACTION = 300.0
LONG_IDLE = 60.0
"""Seconds a session may be idle inside a transaction."""
MANY_TRANSACTIONS = 1_000_000
"""So many transactions may pass while a standby that is connected holds on to old rows."""
MANY_DEAD_ROWS = 100_000
NEAR_WRAPAROUND, VERY_NEAR_WRAPAROUND = 1_000_000_000, 1_600_000_000
"""Of 2,147,483,648 transactions. PostgreSQL vacuums because of it from 200,000,000 on, and in all haste from 1,600,000,000 on."""
CROWDED = 0.85
"""The share of the permitted connections from which on it is time to act."""
CLOCKS_APART = 2.0
LONG_WAIT = 600.0
"""Seconds a due job may wait in a queue that is served."""
LARGE_LOG = 100_000
LITTLE_SPACE, NO_SPACE = 0.05, 0.01
"""Shares of the disk that are free."""
ABOUT_URLS = (
    "write it as postgresql://user:password@host:5432/database; in a password, @ : / ? # % are %40 %3A %2F %3F %23 %25, "
    "which python -c 'import getpass, urllib.parse as u; print(u.quote(getpass.getpass(), \"\"))' does for you"
)


class Finding(NamedTuple):
    """What a check found: `level` is `problem` (something is not running, or a promise doesn't hold), `warning` or `ok`."""

    check: str
    level: str
    finding: str
    remedy: str = ""


Findings = Iterator[Finding]


def examine(settings: Settings) -> list[Finding]:
    """What all checks found, in the order of the checks. Raises nothing."""
    with closing(Doctor(settings)) as doctor:
        return doctor.examine()


class Doctor:
    """One examination of the installation that `settings` describe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._database = db.Database("", size=2, wait=PATIENCE, name="jobsys doctor", patience=2 * PATIENCE)
        self._where = self._role = self._name = ""

    def examine(self) -> list[Finding]:
        """The findings of all checks that make sense: of a database that is not there, none but that."""
        on_the_server = (self.server, self.safety, self.connections, self.clock, self.notifications, self.transactions, self.vacuum)
        on_our_tables = (self.schema, self.workers, self.queues, self.limits, self.running, self.retention, self.counters)
        findings = list(told("database", self.database))
        if findings[0].level == "ok":
            for check in on_the_server:
                findings += told(check.__name__, check)
            findings += told("migrations", self.migrations)
            if findings[-1].finding != NOT_MIGRATED:
                for check in on_our_tables:
                    findings += told(check.__name__, check)
        findings += told("output", self.output)
        findings += told("mail", self.mail)
        return findings

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    # PostgreSQL

    def database(self) -> Findings:
        """Does it answer?"""
        try:
            url = db.url_of(self.settings)
        except SettingsError as error:
            what, _, remedy = str(error).partition(": ")
            yield problem(what, remedy)
            return
        try:
            dsn = extensions.parse_dsn(url)
        except psycopg2.ProgrammingError:
            yield problem("DATABASE_URL can't be read as the address of a PostgreSQL", ABOUT_URLS)  # libpq would quote it, password and all
            return
        host = str(dsn.get("host", "this machine"))
        self._where = host if host.startswith("/") else f"{host}:{dsn.get('port', 5432)}"
        self._database.url = url
        begun = time.monotonic()
        try:
            [(version, _, self._name, self._role, *_)] = self._ask("server")
        except DatabaseUnavailable as error:
            if re.search(r"://[^@]*:.*[@/?#].*@", url.split("?host=")[0]):
                yield problem("DATABASE_URL leads nowhere; its password may have characters in it that mean something in a URL", ABOUT_URLS)
            else:
                yield problem(f"the database can't be reached: {error}", self._way_in(str(error), dsn))
            return
        took = (time.monotonic() - begun) * 1000
        yield ok(f"PostgreSQL {version.split()[0]}, {self._name} at {self._where} as {self._role}, answers in {took:.0f} ms")

    def server(self) -> Findings:
        """Is it a PostgreSQL that can be written to, and new enough?"""
        [(version, number, _, _, recovering, _)] = self._ask("server")
        if number // 10_000 < OLDEST_SERVER:
            yield problem(f"PostgreSQL {version} is too old, jobsys needs {OLDEST_SERVER} or newer", "upgrade the server (pg_upgrade)")
        if recovering:
            yield problem(
                f"{self._where} is a standby, or still recovering: nothing can be written there",
                "let DATABASE_URL name the primary, or all hosts: postgresql://…@host1,host2/…?target_session_attrs=read-write",
            )
        yield ok("new enough, no standby, and can be written to")

    def safety(self) -> Findings:
        """Are the settings so that what was promised survives a crash?"""
        wanted = {
            "fsync": ("on", "after a crash of the machine the whole database may be lost"),
            "full_page_writes": ("on", "a crash of the machine in the middle of a write may destroy tables"),
            "synchronous_commit": ("on", "a crash of PostgreSQL may forget jobs that were accepted, and run jobs again that had ended"),
            "session_replication_role": ("origin", "triggers don't fire: jobs are not counted, and nobody is notified of them"),
            "default_transaction_read_only": ("off", "no job can be submitted, and none claimed"),
            "default_transaction_isolation": ("read committed", "limits of queues may not hold, and claims may fail"),
        }
        for name, setting, source in self._ask("settings_in_force", names=list(wanted)):
            good, otherwise = wanted[name]
            if setting != good and not (name == "synchronous_commit" and setting in ("local", "remote_write", "remote_apply")):
                yield problem(f"{name} is {setting}: {otherwise}", self._setting(name, good, source))
        yield ok("fsync, full_page_writes and synchronous_commit are on")

    def connections(self) -> Findings:
        """How many connections may still be made?"""
        [(used, most, used_here, most_here, used_by_us, most_by_us)] = self._ask("connections")
        database, role = _identifier(self._name), _identifier(self._role)
        for whose, number, permitted, remedy in (
            ("the server has", used, most, f"alter system set max_connections = {2 * most}; and restart PostgreSQL"),
            (f"database {self._name} has", used_here, most_here, f"alter database {database} connection limit {2 * most_here};"),
            (f"role {self._role} has", used_by_us, most_by_us, f"alter role {role} connection limit {2 * most_by_us};"),
        ):
            if permitted >= 0 and number >= CROWDED * permitted:
                who = "who has them: select application_name, state, count(*) from pg_stat_activity group by 1, 2 order by 3 desc;"
                yield warning(f"{whose} {number} of {permitted} connections in use", f"{remedy} -- {who}")
        yield ok(f"{number_of(used, 'connection')} of {most} in use")

    def clock(self) -> Findings:
        """Do this machine and the database agree on the time?"""
        before = time.time()
        [(theirs,)] = self._ask("clock")
        after = time.time()
        ahead, uncertain = (before + after) / 2 - theirs, (after - before) / 2
        if abs(ahead) > CLOCKS_APART + uncertain:
            which = "ahead of" if ahead > 0 else "behind"
            yield warning(
                f"the clock of this machine is {span(abs(ahead))} {which} the database's, which is the one that counts for jobs",
                "timedatectl set-ntp true  (here, and on the database's machine; timedatectl shows which of them is wrong)",
            )
        yield ok(f"this machine's clock and the database's are within {max(abs(ahead), uncertain) + 0.0005:.3f} s")

    def notifications(self) -> Findings:
        """Do notifications arrive, or does a pooler in between share out sessions by the transaction?"""
        token = new_job_id()
        with (
            self._database.connection() as listener,
            self._database.connection() as other,
            listener.cursor() as hear,
            other.cursor() as say,
        ):
            hear.execute("listen jobsys_doctor; select pg_backend_pid()")
            sessions = hear.fetchall() + db.run(listener, "backend")
            say.execute("begin")  # who gives each transaction the session that was used last has to find another one for the listener now
            db.run(other, "backend")
            sessions += db.run(listener, "backend")
            say.execute("select pg_notify('jobsys_doctor', %s)", [token])
            say.execute("commit")
            arrived = _arrives(listener, token, patience=2.0)
            hear.execute("unlisten jobsys_doctor")
        poll = f"polling finds every job all the same, within POLL_INTERVAL ({self.settings.poll_interval:g} s here)"
        remedy = f"none is needed, {poll}; for faster starts let DATABASE_URL lead to PostgreSQL itself, or to a pool in session mode"
        if len(set(sessions)) > 1:
            pids = " and ".join(str(pid) for (pid,) in dict.fromkeys(sessions))
            silent = "" if arrived else ", and a notification did not arrive"
            yield warning(f"a pooler in transaction mode stands in between: one connection had sessions {pids}{silent}", remedy)
        elif not arrived:
            yield warning("a notification did not arrive within 2 s", remedy)
        yield ok("notifications arrive, and no transaction pooler stands in between")

    def transactions(self) -> Findings:
        """Who holds an old snapshot, under which no dead row can be removed, or is idle inside a transaction?"""
        yield from self._long_transactions()
        for gid, owner, age, since in self._ask("prepared_transactions"):
            if age > LONG_TRANSACTION:
                yield warning(
                    f"transaction {gid!r} of {owner} was prepared {span(age)} ago and not ended: it keeps its locks, "
                    f"and all rows that died in the {since:,} transactions since",
                    f"rollback prepared {_literal(gid)};  (or commit prepared, when you know that the others did)",
                )
        for what, name, active, since in self._ask("replication"):
            if not active or since > MANY_TRANSACTIONS:
                state = "" if active else ", which nobody reads,"
                yield warning(
                    f"{what} {name}{state} keeps all rows that died in the last {since:,} transactions",
                    f"select pg_drop_replication_slot({_literal(name)});  (when its reader will not come back)"
                    if what == "replication slot"
                    else "end the long queries on it, or set hot_standby_feedback = off there",
                )
        [(hidden,)] = self._ask("hidden_sessions")
        if hidden:
            yield warning(
                f"{number_of(hidden, 'session')} of other roles can't be looked into: one of them may hold an old snapshot",
                f"grant pg_read_all_stats to {_identifier(self._role)};",
            )
        yield ok("no old snapshot, no idle transaction")

    def _long_transactions(self) -> Findings:
        for pid, program, user, host, state, query, open_for, in_state, since in self._ask("open_transactions"):
            idle = state is not None and state.startswith("idle in transaction")
            old = since is not None and open_for > LONG_TRANSACTION
            if not old and not (idle and in_state > LONG_IDLE):
                continue
            who = f"session {pid} ({', '.join(filter(None, (program, user, host)))})"
            doing = f"has been {state} for {span(in_state)} after" if idle else "runs"
            holds = "may keep locks" if since is None else f"keeps all rows that died in the {since:,} transactions since"
            yield warning(
                f"{who} began a transaction {span(open_for)} ago, and {holds}; it {doing}: {_shown(query)}",
                f"select pg_terminate_backend({pid});"
                + (f"  and from now on: alter role {_identifier(user)} set idle_in_transaction_session_timeout = '1min';" if idle else ""),
            )

    def vacuum(self) -> Findings:
        """Are dead rows removed, and transaction numbers freed?"""
        names = ("autovacuum", "track_counts")
        for name, setting, source in self._ask("settings_in_force", names=list(names)):
            if setting == "off":
                yield warning(f"{name} is off: dead rows pile up, and claims get slower", self._setting(name, "on", source))
        most = 0
        for table, live, dead, ago, switched_off in self._ask(
            "dead_rows", tables=[each.name for each in _objects() if each.kind == "table"]
        ):
            most = max(most, dead)
            if switched_off:
                yield warning(f"autovacuum is off for {table}: its dead rows pile up", f"alter table {table} reset (autovacuum_enabled);")
            if dead > MANY_DEAD_ROWS and dead > live / 2:
                last = "never vacuumed" if ago is None else f"last vacuumed {span(ago)} ago"
                yield warning(
                    f"{table} has {dead:,} dead rows beside {live:,} live ones, {last}",
                    f"vacuum (verbose) {table};  (what it can't remove yet is kept by an old snapshot)",
                )
        [(database, age)] = self._ask("wraparound")
        if age > NEAR_WRAPAROUND:
            finding = f"database {database} is {age:,} transactions behind in freezing; at 2,147,483,648 PostgreSQL accepts no more"
            remedy = f"vacuumdb --freeze --jobs 2 {shlex.quote(database)}  (first end what holds an old snapshot)"
            yield problem(finding, remedy) if age > VERY_NEAR_WRAPAROUND else warning(finding, remedy)
        yield ok(f"autovacuum is on, at most {number_of(most, 'dead row')} in a table")

    # Our tables

    def migrations(self) -> Findings:
        """Is the schema the one of this jobsys?"""
        [(there,)] = self._ask("migrated")
        if not there:
            [(*_, path)] = self._ask("server")
            elsewhere = [schema for (schema,) in self._ask("schemas_of_jobsys")]
            if elsewhere:
                yield warning(
                    f"the tables of jobsys in schema {', '.join(elsewhere)} are not on the search_path, {path}",
                    f"add to DATABASE_URL: ?options=-csearch_path%3D{elsewhere[0]}",
                )
            yield problem(NOT_MIGRATED, "jobsys migrate")
            return
        applied: dict[int, str] = dict(self._ask("versions_applied"))
        known = {migration.version: migration.name for migration in migrations.known()}
        if missing := [name for version, name in known.items() if version not in applied]:
            yield problem(f"{number_of(len(missing), 'migration')} not applied: {', '.join(missing)}", "jobsys migrate")
        if newer := [name for version, name in applied.items() if version not in known]:
            yield warning(
                f"the database was migrated by a newer jobsys than this one, {__version__}, which does not know {', '.join(newer)}",
                "install here the version that migrated it",
            )
        yield ok(f"{number_of(len(applied), 'version')} applied, the last is {applied[max(applied)]}" if applied else "none")

    def schema(self) -> Findings:
        """Is everything there that the migrations made?"""
        expected = _objects({version for version, _ in self._ask("versions_applied")})
        kinds, names, tables, statements = zip(*expected, strict=True) if expected else ((),) * 4
        made = dict(zip(zip(kinds, names, strict=True), zip(tables, statements, strict=True), strict=True))
        for kind, name, fault in self._ask("faulty_objects", kinds=list(kinds), names=list(names), tables=list(tables)):
            table, statement = made[kind, name]
            yield problem(f"{kind} {name} is {fault}", _restore(kind, name, fault, table, statement))
        counts = Counter(kinds)
        yield ok(", ".join(number_of(counts[kind], kind, *many) for kind, *many in KINDS if counts[kind]) + " as they should be")

    def workers(self) -> Findings:
        """Who works, are their hearts heard, and are they of one version?"""
        rows = self._ask("heartbeats")
        living = [row for row in rows if row[9]]
        for _, host, pid, *_, silent, lost_after, alive, running, _ in rows:
            if alive:
                continue
            heard = "was seen to die" if silent is None else f"has been silent for {span(silent)}, and is lost after {span(lost_after)}"
            finding = f"worker {host}:{pid} {heard}; it has {number_of(running, 'job')}"
            remedy = f"look for process {pid} on {host}, and restart jobsys worker there"
            if living:
                yield warning(finding, f"{remedy}; a living worker gives its jobs back to their queues")
            else:
                yield problem(finding, f"{remedy}; its jobs go back to their queues as soon as a worker runs")
        if not living:
            yield problem("no worker is running" if not rows else "no worker is alive", "jobsys worker")
            return
        versions: defaultdict[str, list[str]] = defaultdict(list)
        for _, host, pid, version, *_ in living:
            versions[version].append(f"{host}:{pid}")
        if len(versions) > 1:
            census = ", ".join(f"{number_of(len(who), 'worker')} of {version} ({_some(who)})" for version, who in sorted(versions.items()))
            yield warning(f"the workers are of different versions: {census}", "restart jobsys worker where the old version runs")
        elif __version__ not in versions:
            yield warning(f"all workers are of version {next(iter(versions))}, and this is jobsys {__version__}", "restart jobsys worker")
        threads = sum(row[6] for row in living)
        yield ok(f"{number_of(len(living), 'worker')} alive with {number_of(threads, 'thread')}, version {__version__}")

    def queues(self) -> Findings:
        """Will every due job be started by somebody, and soon?"""
        waited: dict[str, float] = dict(self._ask("due"))
        alive = [row for row in self._ask("heartbeats") if row[9]]
        living = [(row[4], row[5]) for row in alive]
        held_back = {type for row in alive for type in row[11]}
        slowed = {name for name, *limits in self._ask("queue_settings") if any(limits)}
        pending = self._pending()
        for queue, seconds in sorted(waited.items(), key=itemgetter(1), reverse=True):
            types = {type: number for type, number in pending[queue].items() if number > 0}
            due = number_of(sum(types.values()), "due job") if types else "jobs that were not counted"
            known = {type for serves, knows in living if queue in serves for type in knows}
            unknown = sorted(set(types) - known)
            if not any(queue in serves for serves, _ in living):
                of_types = f" ({_some(unknown)})" if unknown else ""
                yield problem(
                    f"no living worker serves queue {queue}, where {due}{of_types} wait, the oldest for {span(seconds)}",
                    _to_serve(unknown) if living else "jobsys worker",
                )
                continue
            for type in unknown:
                [(age,)] = self._ask("oldest_of_type", queue=queue, type=type)
                oldest = f", the oldest for {span(age)}" if age is not None else ""
                wait = number_of(types[type], "due job waits", "due jobs wait")
                yield problem(
                    f"no living worker of queue {queue} knows the type {type}, of which {wait}{oldest}",
                    f"{_to_serve([type])}  (what they are: jobsys jobs --status PENDING --type {shlex.quote(type)})",
                )
            for type in sorted(held_back & types.keys()):
                wait = number_of(types[type], "due job waits", "due jobs wait")
                yield warning(
                    f"{type}, of which {wait}, is held back: all its last jobs failed the same way",
                    f"see why: jobsys jobs --type {shlex.quote(type)}; workers try one now and then, and go on when one succeeds",
                )
            if seconds > LONG_WAIT and queue not in slowed and not unknown and not held_back & types.keys():
                yield warning(
                    f"queue {queue} has {due}, and the oldest has waited for {span(seconds)}: the workers don't keep up",
                    "raise WORKER_THREADS or WORKER_PROCESSES, or start jobsys worker on another machine",
                )
        longest = f", the oldest for {span(max(waited.values()))}" if waited else ""
        waiting = sum(max(number, 0) for types in pending.values() for number in types.values())
        yield ok(f"{number_of(waiting, 'due job')} waiting{longest}; all will be started")

    def limits(self) -> Findings:
        """Do jobs wait because somebody said so?"""
        waited: dict[str, float] = dict(self._ask("due"))
        pending = self._pending()
        settings = self._ask("queue_settings")
        for queue, paused, count, period, most in settings:
            if queue not in waited:
                continue
            waiting = f"{number_of(sum(pending[queue].values()), 'due job waits', 'due jobs wait')}, the oldest for {span(waited[queue])}"
            name = shlex.quote(queue)
            if paused:
                yield warning(f"queue {queue} is paused, and {waiting}", f"jobsys resume {name}")
            rate = f" --rate {count}/{period:g}s" if count else ""
            if most is not None:
                [(running,)] = self._ask("count_running", queue=queue)
                if running >= most:
                    finding = f"queue {queue} is at its limit, {running} of {most} running, and {waiting}"
                    yield warning(finding, f"jobsys limit {name}{rate} --max-running {2 * most}")
            if count and (needed := sum(pending[queue].values()) * period / count) > LONG_WAIT:
                both = f" --max-running {most}" if most is not None else ""
                finding = f"queue {queue} starts {count} per {span(period)}, and {waiting}: they need {span(needed)}"
                yield warning(finding, f"jobsys limit {name} --rate {2 * count}/{period:g}s{both}")
        paused = [queue for queue, paused, *_ in settings if paused]
        yield ok(f"{_some(paused)} paused, nothing waits there" if paused else "no queue is paused, or held up by its limits")

    def running(self) -> Findings:
        """Does everything that is PROCESSING have a worker?"""
        rows = self._ask("abandoned")
        if rows:
            jobs, oldest = sum(number for _, number, _ in rows), max(age for *_, age in rows)
            has_rescuer = any(row[9] for row in self._ask("heartbeats"))
            finding = (
                f"{number_of(jobs, 'job')} PROCESSING at {number_of(len(rows), 'worker')} not there any more, for up to {span(oldest)}"
            )
            if has_rescuer and oldest < LONG_WAIT:
                yield warning(finding, "wait: the living workers give them back to their queues within a minute or so")
            else:
                yield problem(finding, "restart jobsys worker, which gives them back to their queues within a minute")
        yield ok("every running job has its worker")

    def retention(self) -> Findings:
        """Are old jobs removed?"""
        days = self.settings.retention_days
        if days == 0:
            yield ok("RETENTION_DAYS is 0: finished jobs are kept")
            return
        [(old, age)] = self._ask("unpruned", days=days)
        if old:
            yield warning(
                f"{old} of the first 100 jobs are past RETENTION_DAYS ({days}): the oldest ended {span(age)} ago",
                "start jobsys worker, which removes them; if it runs, look at its RETENTION_DAYS and for 'chore failed' in its log",
            )
        [(beyond, first)] = self._ask("unprunable", days=days)
        if beyond:
            yield warning(
                f"{beyond:,}{' or more' if beyond == 10_000 else ''} jobs past RETENTION_DAYS ({days}) are never removed: "
                "their ids are not UUIDs of version 7",
                f"delete from jobs where id >= '{first}' and finished_at < now() - interval '{days} days';  "
                "(and insert without an id: jobs get the right one by themselves)",
            )
        yield ok(f"no finished job is older than RETENTION_DAYS ({days})")

    def counters(self) -> Findings:
        """Is the log of counts summed?"""
        [(rows,)] = self._ask("unsummed", most=LARGE_LOG + 1)
        if rows > LARGE_LOG:
            yield warning(
                f"tally_log has more than {LARGE_LOG:,} rows that no worker has summed: reading counts gets slow",
                "start jobsys worker, which sums them; if it runs, look for 'chore failed' in its log",
            )
        yield ok(f"{number_of(rows, 'row')} of counts to be summed")

    # This machine

    def output(self) -> Findings:
        """Can files be written?"""
        path = self.settings.output_dir.absolute()
        place = next(each for each in (path, *path.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            yield problem(
                f"OUTPUT_DIR {path} can't be written to: {error.strerror or error}",
                f"install -d -o $(id -un) {shlex.quote(str(path))}, or let OUTPUT_DIR name a directory that can be",
            )
            return
        disk = shutil.disk_usage(place)
        free = f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB are free"
        if disk.free < LITTLE_SPACE * disk.total:
            finding, remedy = f"the disk of OUTPUT_DIR {path} is nearly full: {free}", f"du -xh {shlex.quote(str(place))} | sort -h | tail"
            yield problem(finding, remedy) if disk.free < NO_SPACE * disk.total else warning(finding, remedy)
        yield ok(f"OUTPUT_DIR {path} can be written to{'' if place == path else ' (it will be made)'}, {free}")

    def mail(self) -> Findings:
        """Does the mail server answer, and offer what the settings ask for?"""
        chosen = self.settings
        if not chosen.smtp_host:
            yield ok(f"SMTP_HOST is not set: mails go to the catcher of bin/dev, 127.0.0.1:{chosen.smtp_port}")
            return
        where = f"{chosen.smtp_host}:{chosen.smtp_port}"
        try:
            context = ssl.create_default_context()
            if chosen.mail_tls == "tls":
                server: smtplib.SMTP = smtplib.SMTP_SSL(chosen.smtp_host, chosen.smtp_port, timeout=PATIENCE, context=context)
            else:
                server = smtplib.SMTP(chosen.smtp_host, chosen.smtp_port, timeout=PATIENCE)
            with server:
                if chosen.mail_tls == "starttls":
                    server.starttls(context=context)
                server.ehlo_or_helo_if_needed()
                if chosen.smtp_user and not server.has_extn("auth"):
                    yield problem(f"mail server {where} offers no login, and SMTP_USER is set", "SMTP_TLS=starttls, or unset SMTP_USER")
        except (OSError, smtplib.SMTPException) as error:
            yield problem(
                f"mail server {where} can't be used: {getattr(error, 'strerror', None) or _first_line(error)}",
                f"nc -vz {chosen.smtp_host} {chosen.smtp_port}  (does it listen? do SMTP_PORT and SMTP_TLS={chosen.mail_tls} fit it?)",
            )
            return
        yield ok(f"mail server {where} answers, TLS: {chosen.mail_tls}")

    # How they ask, and what they say

    def _ask(self, name: str, /, **parameters: Any) -> list[db.Row]:
        """The rows of one named statement, which writes nothing, goes by indexes, and ends in time."""
        with self._database.connection() as connection, connection.cursor() as cursor:
            cursor.execute(f"begin read only; set local statement_timeout = '{PATIENCE:g}s'; set local enable_seqscan = off")
            try:
                return db.run(connection, name, **parameters)
            finally:
                if not connection.closed:
                    cursor.execute("rollback")

    def _pending(self) -> defaultdict[str, Counter[str]]:
        """How many jobs are due, by queue and type, as they were counted."""
        pending: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for queue, type, status, entered, departed in self._ask("counts"):
            if status == "PENDING":
                pending[queue][type] += entered - departed
        return pending

    def _way_in(self, error: str, dsn: dict[str, Any]) -> str:
        """What to do about a connection that failed."""
        host, port = shlex.quote(str(dsn.get("host", "/var/run/postgresql"))), dsn.get("port", 5432)
        if "too many" in error or "connection slots" in error or "connection limit" in error:
            return "stop what holds connections (web servers, workers, other programs), or raise max_connections and restart PostgreSQL"
        if "authentication failed" in error or "no password" in error:
            return "correct the user and the password in DATABASE_URL"
        if f'database "{dsn.get("dbname")}" does not exist' in error:
            return f"createdb -h {host} -p {port} {shlex.quote(dsn['dbname'])} && jobsys migrate, or correct the name in DATABASE_URL"
        if "translate host name" in error:
            return "correct the host in DATABASE_URL, or the machine's DNS"
        return f"pg_isready -h {host} -p {port}  (is PostgreSQL running, and DATABASE_URL right?)"

    def _setting(self, name: str, value: str, source: str) -> str:
        """The command that gives a setting of PostgreSQL its right value where it got the wrong one."""
        database, role = _identifier(self._name), _identifier(self._role)
        begin, commit = ("begin read write; ", " commit;") if name == "default_transaction_read_only" else ("", "")
        commands = {
            "database": f"{begin}alter database {database} reset {name};{commit}",
            "user": f"{begin}alter role {role} reset {name};{commit}",
            "database user": f"{begin}alter role {role} in database {database} reset {name};{commit}",
            "global": f"{begin}alter role all reset {name};{commit}",
            "client": f"take {name} out of the options in DATABASE_URL, or out of PGOPTIONS",
            "command line": f"start PostgreSQL without -c {name}=…",
        }
        return commands.get(source, f"alter system set {name} = '{value}'; select pg_reload_conf();")


NOT_MIGRATED = "the database has no tables of jobsys"
KINDS = (("table",), ("index", "indexes"), ("trigger",), ("function",), ("type",))


class Expected(NamedTuple):
    """Something that a migration makes: a trigger also has a table."""

    kind: str
    name: str
    table: str
    statement: str


def _objects(versions: set[int] | None = None) -> list[Expected]:
    """What these versions of the schema (None: all) made and did not drop or rename again, read from their files."""
    expected: dict[tuple[str, str], Expected] = {}
    verbs = re.compile(
        r"^(?P<verb>create(?: or replace| unlogged| unique)?|drop|alter) (?P<kind>table|index|trigger|function|type)"
        r"(?: concurrently)?(?: if (?:not )?exists)? (?P<name>\w+)(?P<rest>[^;]*)",
        re.MULTILINE | re.IGNORECASE,
    )
    for migration in migrations.known():
        if versions is not None and migration.version not in versions:
            continue
        for match in verbs.finditer(migration.text):
            verb, kind, name, rest = match["verb"].lower(), match["kind"].lower(), match["name"].lower(), match["rest"]
            if verb.startswith("create"):
                on = re.search(r"\bon (\w+)", rest) if kind == "trigger" else None
                expected[kind, name] = Expected(kind, name, on[1] if on else "", " ".join(match[0].split()))
            elif verb == "drop":
                expected.pop((kind, name), None)
            elif (renamed := re.fullmatch(r"(?: on \w+)?\s+rename to (\w+)\s*", rest)) and (kind, name) in expected:
                expected[kind, renamed[1]] = expected.pop((kind, name))._replace(name=renamed[1])
    return list(expected.values())


def _restore(kind: str, name: str, fault: str, table: str, statement: str) -> str:
    if fault == "invalid":
        return f"reindex index concurrently {name};"
    if fault == "disabled":
        return f"alter table {table} enable trigger {name};"
    if kind == "index":
        return statement.replace("index ", "index concurrently ", 1) + ";"
    if kind == "trigger":
        return f"{statement};"
    if kind == "table":
        return "restore it from a backup: jobs, and what happened to them, were in there"
    return f"run its `create {kind} {name}` from {db.SQL} again"


def _to_serve(types: list[str]) -> str:
    """Which workers to start so that jobs of these types run."""
    ours = job_types.registry.load([]).types
    others = [type for type in types if type not in ours]
    return f"start jobsys worker with the module in JOB_MODULES that declares {_some(others)}" if others else "restart jobsys worker"


def problem(finding: str, remedy: str) -> Finding:
    """Something is not running, or a promise doesn't hold."""
    return Finding("", "problem", finding, remedy)


def warning(finding: str, remedy: str) -> Finding:
    """Something is not as it should be."""
    return Finding("", "warning", finding, remedy)


def ok(finding: str) -> Finding:
    """What was looked at, and is well."""
    return Finding("", "ok", finding)


def told(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check found; that it failed is a finding, too. All is well only when there is nothing else."""
    found = []
    try:
        for finding in check():
            found.append(finding._replace(check=name))
    except Exception as error:
        what = f"could not be checked: {_first_line(error)}"
        found.append(Finding(name, "warning", what, "run jobsys doctor again; its statements are in sql/doctor.sql, to be run by hand"))
    return [finding for finding in found if finding.level != "ok"] or found


def _arrives(connection: Any, token: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        connection.poll()
        while connection.notifies:
            if connection.notifies.pop(0).payload == token:
                return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        listening = select.poll()
        listening.register(connection.fileno(), select.POLLIN)
        listening.poll(left * 1000)


def _shown(query: str) -> str:
    """The beginning of a statement, up to its first literal."""
    beginning, *rest = re.split(r"'|\$\w*\$", query, maxsplit=1)
    text = " ".join(beginning.split())
    return text[:80] + ("…" if len(text) > 80 or rest else "")


def _identifier(name: str) -> str:
    return name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def number_of(number: int, one: str, many: str | None = None) -> str:
    """`1 job`, `2,000 jobs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def span(seconds: float) -> str:
    """A length of time in its two largest units: `12 s`, `3 h 5 min`, `2 days 4 h`."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return number_of(days, "day") + (f" {hours} h" if hours else "")
