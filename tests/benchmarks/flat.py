"""What a claim of 100 jobs touches when the table is full of others: buffers, beside those on a table of 10,000 waiting jobs."""

from __future__ import annotations

import contextlib
import json
from statistics import median
from typing import Any

from jobsys import db
from jobsys.claims import BEGINNING
from jobsys.ids import new_job_id
from jobsys.job_types import PRIORITIES
from jobsys.system import JobSystem
from tests.benchmarks.harness import Bench, execute, tell
from tests.benchmarks.result import Result

UNIT = "times the buffers"
BASE, CLAIMED = 10_000, 100
INSERT = """
    insert into jobs (id, type, queue, priority, status, max_attempts, run_at, created_at, started_at, finished_at, worker)
    select
        overlay(
            replace(gen_random_uuid()::text, '-', '')
            placing lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7'
            from 1 for 13
        )::uuid,
        '{type}', {queue}, {priority}, '{status}', 4, {run_at}, at, {ended}, {ended}, {worker}
    from (select n, clock_timestamp() - interval '{age}' + n * interval '10 microseconds' as at from generate_series(1, %s) as n) as series
"""
WAITING = {
    "type": "NOOP",
    "queue": "'default'",
    "priority": 0,
    "status": "PENDING",
    "run_at": "at",
    "ended": "null::timestamptz",
    "worker": "null::uuid",
    "age": "1 hour",
}
CROWDS: dict[str, dict[str, Any]] = {
    "finished": WAITING | {"status": "COMPLETED", "ended": "at", "worker": "gen_random_uuid()", "age": "1 day"},
    "scheduled for tomorrow, most urgent": WAITING
    | {"status": "SCHEDULED", "priority": min(PRIORITIES.values()), "run_at": "at + interval '1 day'"},
    "waiting": WAITING,
    "waiting in 500 other queues": WAITING | {"queue": "'queue ' || n %% 500"},
}


def measure(bench: Bench) -> Result:
    """The worst ratio."""
    crowd = bench.sized(1_000_000, quick=20_000, full=10_000_000)
    buffers = {"alone": touched(bench, {}, 0)}
    for name, columns in CROWDS.items():
        buffers[name] = touched(bench, columns, crowd)
        tell(f"  {crowd:,} {name}: {buffers[name]:g} buffers; alone {buffers['alone']:g}")
    ratios = {name: value / buffers["alone"] for name, value in buffers.items() if name != "alone"}
    return Result(
        UNIT, max(ratios.values()), details={"crowd": crowd, "waiting": BASE, "claimed": CLAIMED, "buffers": buffers, "ratios": ratios}
    )


def touched(bench: Bench, columns: dict[str, Any], crowd: int) -> float:
    """The median of three claims' buffers, each rolled back."""
    with bench.system() as system:
        url = str(system.settings.database_url)
        with contextlib.closing(db.Database(url).connect()) as connection, connection.cursor() as cursor:
            cursor.execute("set session_replication_role = replica")
            if crowd:
                cursor.execute(INSERT.format(**columns), (crowd,))
            cursor.execute(INSERT.format(**WAITING | {"age": "1 minute" if crowd else "1 hour"}), (BASE,))
            cursor.execute("vacuum analyze jobs")
        return median(_claim(system) for _ in range(3))


def _claim(system: JobSystem) -> int:
    worker = new_job_id()
    register = {"host": "bench", "pid": 0, "version": "0", "queues": ["default"], "types": ["NOOP"], "threads": 1}
    priorities = sorted(PRIORITIES.values())
    parameters = {
        "worker": worker,
        "types": ["NOOP"],
        "queues": ["default"] * len(priorities),
        "priorities": priorities,
        "from_run_at": [BEGINNING[0]] * len(priorities),
        "from_id": [BEGINNING[1]] * len(priorities),
        "n": CLAIMED,
        "turn": "wait",
        "ahead_of": None,
    }
    url = str(system.settings.database_url)
    with contextlib.closing(db.Database(url).connect()) as connection, connection.cursor() as cursor:
        db.run(connection, "register_worker", id=worker, heartbeat=60, lost_after=600, **register)
        connection.autocommit = False
        cursor.execute(f"explain (analyze, buffers, format json) {db.STATEMENTS['claim']}", parameters)
        found = cursor.fetchone()[0]
        connection.rollback()
    plan = (found if isinstance(found, list) else json.loads(found))[0]["Plan"]
    execute(url, "delete from workers")
    if plan["Actual Rows"] != CLAIMED:
        raise RuntimeError(f"the claim took {plan['Actual Rows']} jobs and not {CLAIMED}")
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
