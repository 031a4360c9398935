"""One fault after the other, each with a stream of jobs of its own, and what came of it."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from jobsys import logs, migrations
from jobsys.chaos.faults import FAULTS, Fault, possible
from jobsys.chaos.ledger import compare
from jobsys.chaos.stage import CONNECTIONS, JOBS_PER_SECOND, PROCESSES, Load, Stage, wait_until
from jobsys.errors import DatabaseUnavailable, SettingsError
from jobsys.local import Postgres
from jobsys.settings import Settings

WARM_UP = 3.0
"""Seconds of quiet before each fault, over which the rate before is measured."""
DISK = "1g"
RECOVERY = 20.0
"""Seconds in which at least nine tenths of that rate have to be back."""
SETTLING = 60.0
"""Seconds in which every job has to have ended once no more come. (A claim whose answer was lost is given back after ten.)"""


@dataclass
class Result:
    """What came of one fault. `recovered` is in seconds, None if it did not; `wrong` are sentences by kind, {} when all is well."""

    fault: str
    events: int = 0
    accepted: int = 0
    unanswered: int = 0
    finished: int = 0
    runs: int = 0
    extra_runs: int = 0
    recovered: float | None = None
    wrong: dict[str, list[str]] = field(default_factory=dict)


def trial(stage: Stage, fault: Fault, seconds: float) -> Result:
    """Break one thing for so many seconds while jobs come, and see what became of each of them."""
    result = Result(fault.name)
    wait_until(lambda: stage.facts()["processes"] == PROCESSES, RECOVERY)
    load = stage.load()
    try:
        rate = load.rate(WARM_UP)
        before = stage.facts()
        result.events = fault.run(stage, seconds * fault.times)
        result.recovered = _recovery(load, rate)
        load.stop()
        wait_until(lambda: load.unfinished() == 0, SETTLING)
        overlaps, forgotten = (result.events if may else 0 for may in (fault.overlaps, fault.forgets and stage.server is not None))
        verdict = compare(load.submitted, load.rows(), load.runs(), events=result.events, overlaps=overlaps, forgotten=forgotten)
        result.accepted, result.finished, result.runs = verdict.accepted, verdict.finished, verdict.runs
        result.unanswered, result.extra_runs = sum(each.id is None for each in load.submitted), verdict.extra_runs
        result.wrong = dict(verdict.wrong)
        if result.recovered is None:
            result.wrong["slow"] = [f"{RECOVERY:g} s later fewer than nine tenths of the {rate:.0f} jobs/s of before were done"]
        if left := _what_is_left(stage, before):
            result.wrong["left behind"] = left
    finally:
        load.stop()
        load.remove()
    return result


def main(
    settings: Settings, names: Sequence[str], *, seconds: float, seed: int | None, own_server: bool, only_list: bool, as_json: bool
) -> int:
    """The command `jobsys chaos`: 1 when anything went wrong. Raises SettingsError for a fault there is not."""
    known = {name: fault for name, fault in FAULTS.items() if fault.safe or own_server}
    if unknown := [name for name in names if name not in known]:
        hint = " (with --own-server only)" if unknown[0] in FAULTS else ""
        raise SettingsError(f'fault "{unknown[0]}"{hint} is not one of {", ".join(known)}')
    chosen = [known[name] for name in names] or list(known.values())
    if only_list:
        _print_list(chosen, as_json=as_json)
        return 0
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    logs.configure(settings.model_copy(update={"log_level": "ERROR"}), process="chaos")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: everything is cleared away
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobsys-chaos-")))
        server = None
        if own_server:
            server = Postgres(stack.enter_context(_disk(directory / "server")))
            settings = settings.model_copy(update={"database_url": server.start()})
            stack.callback(server.stop)
            migrations.migrate(server.url)
        stage = Stage(settings, directory, seed=seed, server=server)
        stack.callback(stage.close)
        if not as_json:
            click.echo(f"seed {seed}; each fault for {seconds:g} s, with {JOBS_PER_SECOND} jobs/s on {PROCESSES} worker processes")
        stage.start_workers()
        results = []
        for fault in chosen:
            if fault not in possible(stage):
                click.echo(f"left   {fault.name}: this machine doesn't let jobsys mount a disk for it", err=True)
                continue
            results.append(trial(stage, fault, seconds))
            if not as_json:
                _print_result(fault, results[-1])
    failed = [result for result in results if result.wrong]
    if as_json:
        click.echo(json.dumps({"seed": seed, "results": [asdict(result) for result in results]}, indent=2))
    elif failed:
        click.echo(f"{len(failed)} of {len(results)} went wrong; repeat with --seed {seed}")
    else:
        accepted = sum(result.accepted for result in results)
        click.echo(f"{accepted:,} jobs accepted: none lost, none stuck, each with one end")
    return 1 if failed else 0


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """A directory, on a small disk of its own in memory where this machine permits that."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)]
    mounted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
    yield place
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _print_list(faults: Sequence[Fault], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([{"name": fault.name, "summary": fault.summary, "safe": fault.safe} for fault in faults], indent=2))
    else:
        width = max(len(fault.name) for fault in faults)
        for fault in faults:
            click.echo(f"{fault.name:<{width}}  {fault.summary}")


def _print_result(fault: Fault, result: Result) -> None:
    state = "WRONG" if result.wrong else "ok"
    recovered = "did not recover" if result.recovered is None else f"recovered in {result.recovered:.1f} s"
    unanswered = f", {result.unanswered:,} without an answer" if result.unanswered else ""
    click.echo(f"{state:<6}{fault.name}: {fault.summary}")
    click.echo(
        f"      {result.accepted:,} jobs accepted{unanswered}, {result.finished:,} ended, "
        f"{result.runs:,} runs, {result.extra_runs:,} extra after {result.events:,} events; {recovered}"
    )
    for kind, sentences in result.wrong.items():
        click.echo(f"      {kind}: {sentences[0]}" + (f" (and {len(sentences) - 1:,} more)" if len(sentences) > 1 else ""))


def _recovery(load: Load, rate: float) -> float | None:
    began = time.monotonic()
    while time.monotonic() < began + RECOVERY:
        try:
            if load.rate(1.0) >= 0.9 * rate:
                return max(0.0, time.monotonic() - began - 1.0)
        except DatabaseUnavailable:
            time.sleep(0.2)
    return None


def _what_is_left(stage: Stage, before: dict[str, int]) -> list[str]:
    """Whatever there is more of than before, unless it goes away within some seconds; and fewer processes than before."""
    wrong: list[str] = []

    def settled() -> bool:
        now = stage.facts()
        # Connections and threads come when they are first needed.
        allowed = before | {"connections": max(before["connections"], CONNECTIONS), "threads": before["threads"] + 2}
        more = [name for name in now if now[name] > allowed[name]]
        fewer = ["processes"] if now["processes"] < before["processes"] else []
        wrong[:] = [f"{now[name]} {name} instead of {before[name]}" for name in more + fewer]
        return not wrong

    return [] if wait_until(settled, 15) else wrong
