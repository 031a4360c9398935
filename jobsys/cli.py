"""The command line: every command a few lines over JobSystem. How things look on a terminal and in a pipe is in terminal.py.

Answers go to standard output, everything else to standard error. Exit status: 0 fine, 1 it could not be done (one sentence says
why), 2 the command was wrong, 130 interrupted. What a command needs is imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from jobsys import __version__, arguments
from jobsys.errors import JobsysError

if TYPE_CHECKING:
    from jobsys.settings import Settings
    from jobsys.system import JobRecord, JobSystem

PRIORITY = click.Choice(["high", "default", "medium", "low"], case_sensitive=False)
NO_COLOUR = False if os.environ.get("NO_COLOR") else None  # None: click decides by whether there is a terminal
SCOPES = ["jobs:read", "jobs:write", "admin"]
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def main() -> None:
    """Run the command line and exit. Errors a person can do something about end in one sentence, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    sys.path.insert(0, "")  # as `python -m jobsys` does: the modules of JOB_MODULES may be in the current directory
    try:
        code = commands.main(prog_name="jobsys", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does. Nothing may be flushed there at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except JobsysError as error:
        code = complain(error)
    except Exception as error:
        psycopg2 = sys.modules.get("psycopg2")
        if psycopg2 is None or not isinstance(error, psycopg2.Error):
            raise
        code = complain(error)
    sys.exit(code)


def complain(error: Exception) -> int:
    """Print one sentence on standard error; the exit status."""
    from jobsys.logs import printable
    from jobsys.secrecy import mask

    lines = str(error).strip().splitlines() or [type(error).__name__]
    click.echo(f"jobsys: {printable(mask(lines[0]))}", err=True)
    return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "color": NO_COLOUR})
@click.version_option(__version__, prog_name="jobsys")
def commands() -> None:
    """A job server on one PostgreSQL. Settings come from the environment and from .env."""


@commands.command()
def dev() -> int:
    """Start everything on this machine, with its logs here.

    A PostgreSQL under DATA_DIR unless DATABASE_URL is set, a mail catcher unless SMTP_HOST is, web server and workers. Ctrl-C ends it all.
    """
    from jobsys.dev import dev

    return dev(_settings())


@commands.command()
@click.option("--dry-run", is_flag=True, help="Only print what would be applied.")
def migrate(dry_run: bool) -> int:
    """Bring the database's schema up to date, while everything runs."""
    from jobsys import db, migrations
    from jobsys.logs import printable

    url = db.url_of(_settings())
    plan = migrations.plan(url)
    if plan.unknown:
        click.echo(f"nothing was changed: the schema is newer than this jobsys, it has {', '.join(plan.unknown)}")
    elif not plan.pending:
        click.echo("the schema is up to date")
    elif dry_run:
        click.echo(f"would apply {', '.join(migration.name for migration in plan.pending)}")
    elif applied := migrations.migrate(url, say=lambda line: click.echo(printable(line), err=True)):
        click.echo(f"applied {', '.join(applied)}")
    else:
        click.echo("the schema is up to date: another `jobsys migrate` has just seen to it")
    return 0


@commands.command()
def worker() -> int:
    """Run the worker processes until SIGTERM."""
    from jobsys import worker

    return worker.main(_settings())


@commands.command()
@click.argument("type", metavar="TYPE")
@click.argument("fields", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--payload", metavar="JSON", help="The whole payload; - reads it from standard input.")
@click.option("--priority", type=PRIORITY, help="Instead of the job type's own.")
@click.option("--delay", metavar="DURATION", callback=arguments.duration, help="Run it only after 30s, 5m, 2h, …")
@click.option(
    "--run-at",
    metavar="TIME",
    callback=arguments.moment,
    help="Run it only then: 2030-01-31T08:00 (local time), or with an offset or Z.",
)
@click.option("--max-retries", type=click.IntRange(min=0), help="Attempts after the first.")
@click.option("--group", type=click.UUID, metavar="UUID", help="The group it belongs to.")
@click.option("--idempotency-key", metavar="KEY", help="Submitting the same again with the same key gives the first job.")
@click.option("--wait", is_flag=True, help="Stay until it is finished; exit status 1 unless it is COMPLETED.")
@json_option
def submit(
    type: str,
    fields: tuple[str, ...],
    payload: str | None,
    priority: str | None,
    delay: float | None,
    run_at: datetime | None,
    max_retries: int | None,
    group: UUID | None,
    idempotency_key: str | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Submit a job of TYPE.

    A VALUE that is a JSON number, true, false, null, list or object is taken as such, unless the job type wants text there; anything
    else is text. KEY:=VALUE must be JSON. Prints the job's id, or with --wait its result.

    \b
    jobsys submit EMAIL_SEND to=ann@example.org subject=Hello body="How are you?"
    jobsys submit TEST_JOB sleepMs=5000 progressSteps=10 --wait
    jobsys submit CSV_EXPORT 'data:=[{"a": 1}, {"a": 2}]' --delay 5m
    """
    from jobsys import terminal

    if payload is not None and fields:
        raise click.UsageError("give the payload either as KEY=VALUE or with --payload, not both")
    system = _system()
    job_type = system.types.find(type)
    job = system.submit(
        job_type.name,
        arguments.payload_from_fields(job_type, fields) if payload is None else arguments.payload_from_json(payload),
        priority=priority,
        delay=delay,
        run_at=run_at,
        max_retries=max_retries,
        group_id=str(group) if group else None,
        idempotency_key=idempotency_key,
    )
    if not wait:
        terminal.print_accepted(job, as_json=as_json)
        return 0
    job = terminal.follow(system, job)
    terminal.print_outcome(job, as_json=as_json)
    return 0 if job.status == "COMPLETED" else 1


def filter_options(command: Callable[..., int]) -> Callable[..., int]:
    """Options that say which jobs are meant. The command gets `filters`, as `JobSystem.jobs` takes them."""

    @functools.wraps(command)
    def filtered(*, status: list[str], group: UUID | None, search: str | None, **others: Any) -> int:
        given = {name: others.pop(name) for name in ("type", "queue", "priority")}
        given |= {"status": status or None, "group_id": str(group) if group else None, "q": search}
        return command(**others, filters={name: value for name, value in given.items() if value is not None})

    for option in (
        click.option("--search", metavar="TEXT", help="Only jobs with this in their type, payload, error or id."),
        click.option("--group", type=click.UUID, metavar="UUID", help="Only jobs of this group."),
        click.option("--priority", type=PRIORITY, help="Only jobs of this priority."),
        click.option("--queue", help="Only jobs of this queue."),
        click.option("--type", metavar="TYPE", help="Only jobs of this type."),
        click.option("--status", multiple=True, callback=arguments.statuses, help="Only jobs of this status; can be given more than once."),
    ):
        filtered = option(filtered)
    return filtered


@commands.command()
@filter_options
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many, newest first.")
@json_option
def jobs(filters: dict[str, Any], limit: int, as_json: bool) -> int:
    """List jobs, newest first. In a pipe: id, type, status, priority, queue, attempts, created, error, with tabs between."""
    from jobsys import terminal

    found, more = _take(_system(), limit, **filters)
    terminal.print_jobs(found, more=more, as_json=as_json)
    return 0


@commands.command()
@click.argument("id")
@json_option
def job(id: str, as_json: bool) -> int:
    """Print everything about one job.

    Its payload, result, timeline, and the traceback of the last failure.
    """
    from jobsys import terminal

    system = _system()
    terminal.print_job(system.job(id), system.events(id), system.failures(id), as_json=as_json)
    return 0


@commands.command()
@click.argument("ids", metavar="[ID...]", nargs=-1)
@filter_options
@click.option("--all", "everything", is_flag=True, help="All that are FAILED or DEAD.")
def retry(ids: tuple[str, ...], filters: dict[str, Any], everything: bool) -> int:
    """Run FAILED, DEAD or CANCELLED jobs again.

    Those of the IDs; or all FAILED and DEAD ones that the options describe (CANCELLED ones with --status CANCELLED). `jobsys jobs`
    shows them with the same options.
    """
    if not ids or filters or everything:
        return _many("retry", ids, filters, everything)
    return _each(ids, lambda system, id: f"{id} is {system.retry(id, by='cli').status} again")


@commands.command()
@click.argument("ids", metavar="[ID...]", nargs=-1)
@filter_options
@click.option("--all", "everything", is_flag=True, help="All that wait or run.")
def cancel(ids: tuple[str, ...], filters: dict[str, Any], everything: bool) -> int:
    """Cancel jobs; a running one is asked to stop.

    Those of the IDs; or all that wait or run and that the options describe, which `jobsys jobs` shows with the same ones.
    """
    if not ids or filters or everything:
        return _many("cancel", ids, filters, everything)

    def cancel_one(system: JobSystem, id: str) -> str:
        job = system.cancel(id, by="cli")
        return f"{id} is {job.status}" if job.finished else f"{id} is {job.status} and was asked to stop"

    return _each(ids, cancel_one)


@commands.command()
@click.argument("name", required=False)
@json_option
def types(name: str | None, as_json: bool) -> int:
    """List the job types, what each needs, and an example."""
    import dramatiq

    from jobsys import job_types, terminal
    from jobsys.broker import JobsBroker
    from jobsys.db import Database

    settings = _settings()
    # Plain Dramatiq actors among the modules want a broker when they are declared. This one opens no connection.
    dramatiq.set_broker(JobsBroker(Database(""), settings=settings))
    registry = job_types.registry.load(settings.job_modules)
    shown = [registry.find(name)] if name else list(registry.types.values())
    terminal.print_types(shown, max_retries=settings.max_retries, as_json=as_json)
    return 0


@commands.command()
@json_option
def queues(as_json: bool) -> int:
    """List the queues with their jobs, limits and workers."""
    from jobsys import terminal

    terminal.print_queues(_system().queues(), as_json=as_json)
    return 0


@commands.command()
@click.argument("queue")
def pause(queue: str) -> int:
    """Start no further job of QUEUE, anywhere."""
    system = _system()
    system.pause(queue, by="cli")
    return _tell_queue(system, queue)


@commands.command()
@click.argument("queue")
def resume(queue: str) -> int:
    """Start jobs of QUEUE again."""
    system = _system()
    system.resume(queue, by="cli")
    return _tell_queue(system, queue)


@commands.command()
@click.argument("queue")
@click.option("--rate", help="Starts per period over all workers, evenly spaced: 1/5s, 600/minute.")
@click.option("--max-running", type=click.IntRange(min=1), help="Jobs running at once over all workers.")
def limit(queue: str, rate: str | None, max_running: int | None) -> int:
    """Limit QUEUE, at once and until the next `limit`; without options take its limits away.

    (The ingestion queue gets its rate from INGEST_RATE again whenever a worker starts.)
    """
    from jobsys.errors import SettingsError
    from jobsys.settings import rate as parsed

    try:
        starts = None if rate is None else parsed(rate)
    except ValueError as error:
        raise SettingsError(f"--rate: {error}") from None
    system = _system()
    system.limit(queue, rate=starts if starts and starts[0] else None, max_running=max_running)
    return _tell_queue(system, queue)


@commands.group(invoke_without_command=True)
@click.option("--sub", metavar="NAME", help="Whose token it is: what will stand beside everything it is used for.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="What it is good for; can be given more than once.")
@click.option("--expires", metavar="DURATION", callback=arguments.duration, default="90d", show_default=True, help="At most 365d.")
@click.pass_context
def token(context: click.Context, sub: str | None, scopes: tuple[str, ...], expires: float) -> int:
    """Make a bearer token for a program; only that is printed to standard output.

    It is signed with JWT_SECRET, and kept nowhere. The scope admin includes the others, and the pages below /admin.

    \b
    jobsys token --sub billing --scope jobs:write --expires 90d
    jobsys token revoke --sub billing
    """
    if context.invoked_subcommand is not None:
        return 0
    if sub is None or not scopes:
        raise click.UsageError("a token needs --sub and --scope")
    from jobsys.tokens import Tokens

    try:
        made, claims = Tokens(_settings()).issue(sub, scopes, expires)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    until = datetime.fromtimestamp(claims.expires_at, timezone.utc)
    click.echo(f"for {sub}, scope {' '.join(scopes)}, until {until:%Y-%m-%dT%H:%M:%SZ}, jti {claims.jti}", err=True)
    click.echo(made)
    return 0


@token.command("revoke")
@click.option("--jti", metavar="JTI", help="The token with this jti.")
@click.option("--sub", metavar="NAME", help="Every token of NAME that was made until now.")
def revoke_token(jti: str | None, sub: str | None) -> int:
    """Revoke one token, or all of a subject.

    It takes effect within 5 s in every process, and for good. Tokens of NAME that are made afterwards are good again; and a user who has a
    password can log in anew until that is changed.
    """
    if not jti and not sub:
        raise click.UsageError("say which: --jti or --sub")
    from jobsys.tokens import revoke

    revoke(_system().database, jti=jti, sub=sub)
    for said in ([f"the token {jti}"] if jti else []) + ([f"every token of {sub} that was made until now"] if sub else []):
        click.echo(f"revoked {said}")
    return 0


@commands.command()
@json_option
def workers(as_json: bool) -> int:
    """List the worker processes."""
    from jobsys import terminal

    terminal.print_workers(_system().workers(), as_json=as_json)
    return 0


@commands.command()
@json_option
def doctor(as_json: bool) -> int:
    """Say what is wrong with this installation, and the remedy.

    It looks at the database, its settings and sessions, the schema, the workers, what waits and why, this machine's files and its mail
    server, and changes nothing. Exit status 1 if there is a problem. In a pipe: level, check, finding, remedy, with tabs between.
    """
    from jobsys import terminal
    from jobsys.doctor import examine

    findings = examine(_settings())
    terminal.print_findings(findings, as_json=as_json)
    return 1 if any(finding.level == "problem" for finding in findings) else 0


@commands.command()
@click.argument("what", type=click.Choice(["alerts", "dashboard", "scrape"]))
def monitoring(what: str) -> int:
    """Print a file for Prometheus or Grafana.

    \b
    alerts      alert rules, each with what to do about it
    dashboard   a dashboard, to be imported into Grafana
    scrape      what prometheus.yml needs
    """
    name = {"alerts": "alerts.yml", "dashboard": "dashboard.json", "scrape": "scrape.yml"}[what]
    click.echo((Path(__file__).parent / "monitoring" / name).read_text(encoding="utf-8"), nl=False)
    return 0


@commands.command()
@click.argument("url", required=False)
@click.option("--mail-to", metavar="ADDRESS", default="smoke@example.org", show_default=True, help="Where the mail goes.")
def smoke(url: str | None, mail_to: str) -> int:
    """Send a job of each type and check what comes of it.

    To the system at URL; without one, a system is started for it and stopped again. INGEST_RATE is the pace such a system gets.
    """
    from jobsys.smoke import smoke

    return smoke(url, _settings(), mail_to=mail_to)


@commands.command()
@click.argument("faults", metavar="[FAULT]...", nargs=-1)
@click.option("--seconds", type=click.FloatRange(min=1), default=10.0, show_default=True, help="How long each thing is broken.")
@click.option("--seed", type=int, help="Repeat what chance did in an earlier run.")
@click.option("--own-server", is_flag=True, help="On a PostgreSQL started for it, which is broken, too.")
@click.option("--list", "only_list", is_flag=True, help="Say what can be broken, and break nothing.")
@json_option
def chaos(faults: tuple[str, ...], seconds: float, seed: int | None, own_server: bool, only_list: bool, as_json: bool) -> int:
    """Break things on purpose, and check that no job is lost, doubled or stuck.

    It starts worker processes and submits jobs of its own, in a queue of their own; without --own-server it breaks nothing but these, and
    their connections. Without FAULT it breaks one thing after the other. Exit status 1 when a promise did not hold.
    """
    from jobsys.errors import SettingsError

    try:
        from jobsys.chaos import report
    except ModuleNotFoundError as error:
        if error.name != "psutil":
            raise
        raise SettingsError("jobsys chaos needs the package psutil, which is not installed: pip install 'jobsys[local]'") from None
    return report.main(_settings(), faults, seconds=seconds, seed=seed, own_server=own_server, only_list=only_list, as_json=as_json)


def _settings() -> Settings:
    from jobsys.settings import Settings

    return Settings()


def _system() -> JobSystem:
    """The system, which logs only warnings: a command says itself what it did."""
    from jobsys import logs
    from jobsys.system import JobSystem

    settings = _settings()
    logs.configure(settings.model_copy(update={"log_level": "WARNING"}), process="cli")
    system = JobSystem(settings)
    click.get_current_context().call_on_close(system.close)
    return system


def _tell_queue(system: JobSystem, name: str) -> int:
    """Say how a queue stands now: a slip in its name, or in its limits, is seen at once."""
    from jobsys import terminal

    state = next((queue for queue in system.queues() if queue.name == name), None)
    click.echo(terminal.queue_in_words(name, state))
    return 0


def _each(ids: Iterable[str], act: Callable[[JobSystem, str], str]) -> int:
    system, code = _system(), 0
    for id in ids:
        try:
            click.echo(act(system, id))
        except JobsysError as error:
            code = complain(error)
    return code


def _many(verb: str, ids: tuple[str, ...], filters: dict[str, Any], everything: bool) -> int:
    if [bool(ids), bool(filters), everything].count(True) != 1:
        ways = "their ids, or --status, --type, --queue, --priority, --group or --search, or --all"
        raise click.UsageError(f"say which jobs: {ways} (only one of these three)")
    from jobsys.verbs import VERBS

    system = _system()
    as_of, done, stopping = system.now(), 0, 0
    while True:
        outcome = system.act_on_many(verb, by="cli", as_of=as_of, **filters)
        done, stopping = done + outcome.done, stopping + outcome.stopping
        if not outcome.more or not (outcome.done or outcome.stopping):
            break
        click.echo(f"{done + stopping:,} so far", err=True)
    asked = f", and {stopping:,} running ones were asked to stop" if stopping else ""
    click.echo(f"{done:,} {'job' if done == 1 else 'jobs'} {VERBS[verb].done}{asked}")
    if outcome.more:
        click.echo("there are others, which somebody else has locked: try again", err=True)
    return 1 if outcome.more else 0


def _take(system: JobSystem, limit: int, **filters: Any) -> tuple[list[JobRecord], bool]:
    """`limit` jobs over as many pages as it takes, and whether there are more."""
    found: list[JobRecord] = []
    cursor = None
    while True:
        page = system.jobs(**filters, limit=min(limit - len(found), 500), cursor=cursor)
        found += page.jobs
        cursor = page.next_cursor
        if cursor is None or len(found) >= limit:
            return found, cursor is not None
