"""Are the tests worth anything? Each mutant breaks one line of jobsys, and some test has to notice.

`python -m tests.mutants [NAME…]` tries them one after the other, each in a copy of the checkout, and says which survived; some minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """`old` becomes `new` in `file`; `tests` are pytest's arguments for those that have to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "finish without the fence",
        "sql/schema.sql",
        "where jobs.id = any(array[done.id]) and jobs.claim = done.claim and",
        "where jobs.id = any(array[done.id]) and",
        "tests/test_queue.py -k 'lost_its_job or old_claim'",
    ),
    Mutant(
        "finish whatever the status",
        "sql/schema.sql",
        "jobs.claim = done.claim and jobs.status::text = 'PROCESSING'",
        "jobs.claim = done.claim",
        "tests/test_queue.py -k finishing_twice",
    ),
    Mutant(
        "a process that waits for work is slow",
        "jobsys/work_queue.py",
        "            self._active_since = time.monotonic()\n",
        "            self._active_since = self._active_since or time.monotonic()\n",
        "tests/test_work_queue.py -k active",
    ),
    Mutant(
        "jobs that should run one at a time run side by side",
        "jobsys/work_queue.py",
        "return not (self.one_at_a_time and self.running)",
        "return True",
        "tests/test_work_queue.py -k one_at_a_time",
    ),
    Mutant(
        "jobs that wait for something run one at a time",
        "jobsys/concurrency.py",
        "if waiting and self._busy < BUSY:",
        "if False:",
        "tests/test_concurrency.py -k more_rarely",
    ),
    Mutant(
        "others wait for ever behind a job that should have been short",
        "jobsys/work_queue.py",
        "now > self._active_since + PATIENCE",
        "False",
        "tests/test_work_queue.py -k beside_each_other",
    ),
    Mutant(
        "a claim is due as late as if it took no time",
        "jobsys/claims.py",
        "min(max(int(pace * AHEAD) // 8, 2 * meanwhile), ahead)",
        "int(pace * AHEAD) // 8",
        "tests/test_claims.py -k next_claim_is_due",
    ),
    Mutant(
        "a claim that came late for want of jobs counts as slow",
        "jobsys/claims.py",
        "elif queue_name not in self._left_some:",
        "elif False:",
        "tests/test_claims.py -k want_of_jobs",
    ),
    Mutant(
        "slow claims let a process hoard",
        "jobsys/claims.py",
        "min(seconds, AHEAD)",
        "seconds",
        "tests/test_claims.py -k hoard",
    ),
    Mutant(
        "a restored database may give a claim its old number",
        "sql/queue.sql",
        "claim = claim + 1 + (random() * 2147483647)::bigint",
        "claim = claim + 1",
        "tests/test_queue.py -k claim",
    ),
    Mutant(
        "attempts are not counted at the claim",
        "sql/schema.sql",
        "set status = 'PROCESSING', attempt = attempt + 1,",
        "set status = 'PROCESSING', attempt = attempt,",
        "tests/test_queue.py -k 'crash_is_counted or keeps_its_attempt'",
    ),
    Mutant(
        "an attempt that raised begins once more",
        "jobsys/broker.py",
        "            return  # it has begun, on the straight way",
        "            pass",
        "tests/test_straight.py -k raises",
    ),
    Mutant(
        "an attempt that raised is run once more",
        "jobsys/broker.py",
        """                raise running.__dict__.pop("raised")""",
        "                pass",
        "tests/test_straight.py -k raises",
    ),
    Mutant(
        "who listens hears nothing of what goes straight",
        "jobsys/broker.py",
        "        return not others",
        "        return True",
        "tests/test_straight.py -k listens",
    ),
    Mutant(
        "outcomes gather whoever waits for them",
        "jobsys/presence.py",
        "soon=not self.work.queue or self._is_waited_for(outcome)",
        "soon=not self.work.queue",
        "tests/test_settlements.py -k gather",
    ),
    Mutant(
        "a released job loses an attempt",
        "sql/queue.sql",
        "        attempt = attempt - 1,\n        worker = null\n    from given",
        "        worker = null\n    from given",
        "tests/test_queue.py -k keeps_its_attempt",
    ),
    Mutant(
        "rescue without the state in its WHERE",
        "sql/queue.sql",
        "    where status = 'PROCESSING' and worker = %(worker)s::uuid\n    order by jobs.id",
        "    where worker = %(worker)s::uuid\n    order by jobs.id",
        "tests/test_model.py",
    ),
    Mutant(
        "a worker that was declared lost goes on claiming",
        "sql/schema.sql",
        "and exists (select from workers where workers.id = worker_id and heartbeat_at > '-infinity')",
        "",
        "tests/test_queue.py -k declared_lost_claims_nothing",
    ),
    Mutant(
        "an urgent job waits for the hundreds that are claimed with it",
        "sql/schema.sql",
        "array[ahead_of - 1, 32767]",
        "array[32767]",
        "tests/test_claims.py -k trickle",
    ),
    Mutant(
        "a trickle of urgent jobs keeps the others from being claimed",
        "jobsys/claims.py",
        " and queue_name not in self._overtaken else",
        " else",
        "tests/test_claims.py -k trickle",
    ),
    Mutant(
        "who stands by never waits in line",
        "jobsys/claims.py",
        'return "wait" if now >= standing.wait_at else "try"',
        'return "try"',
        "tests/test_claims.py -k 'waits_in_line or hangs'",
    ),
    Mutant(
        "one inserted row is counted twice",
        "sql/schema.sql",
        "        if not found then\n            insert into tally_log",
        "        if true then\n            insert into tally_log",
        "tests/test_model.py",
    ),
    Mutant(
        "silence counts right after an outage",
        "jobsys/chores.py",
        "silence_counts=time.monotonic() >= self._silence_counts_from",
        "silence_counts=True",
        "tests/test_queue.py -k condemns_nobody",
    ),
    Mutant(
        "no polling while notifications work",
        "jobsys/claims.py",
        "        return wait if wait > 0 else self._poll_interval",
        "        return 3600.0",
        "tests/test_worker.py -k nobody_is_told_of",
    ),
    Mutant(
        "what a process finds in another of its queues is not looked into",
        "jobsys/claims.py",
        "            self._bells[other].set()\n",
        "            pass\n",
        "tests/test_claims.py -k by_one_statement",
    ),
    Mutant(
        "a process that was told while it had no room sleeps on",
        "jobsys/claims.py",
        "        self._sound.discard(queue_name)\n",
        "",
        "tests/test_claims.py -k had_no_room_is_claimed",
    ),
    Mutant(
        "a process that slept looks around no more",
        "jobsys/claims.py",
        "            if self._known(queue_name) != known:",
        "            if self._known(queue_name) != known and False:",
        "tests/test_claims.py -k looks_around",
    ),
    Mutant(
        "a look for anything that waits may read the whole table",
        "sql/queue.sql",
        "jobs.queue = looked_at.queue order by priority, run_at, id limit 1",
        "jobs.queue = looked_at.queue limit 1",
        "tests/test_queue.py -k look_at_empty_queues",
    ),
    Mutant(
        "a bell that rings as a nap ends is not heard",
        "jobsys/claims.py",
        "            if told := bell.is_set():\n                bell.clear()\n",
        "            told = bell.is_set()\n            bell.clear()\n",
        "tests/test_claims.py -k just_as_its_nap_ends",
    ),
    Mutant(
        "who has slow work does not look around",
        "jobsys/claims.py",
        "        slept, heard = queue_name in self._sound,",
        "        slept, heard = queue_name in self._naps,",
        "tests/test_claims.py -k also_when_it_is_slow",
    ),
    Mutant(
        "a queue that sleeps says that there is room",
        "jobsys/claims.py",
        "            if self._occupied and queue_name not in self._sound:",
        "            if self._occupied:",
        "tests/test_claims.py -k that_another_has_not",
    ),
    Mutant(
        "an outcome that can't be written is dropped",
        "jobsys/settlements.py",
        "                    self._waiting.extendleft(unwritten)\n",
        "",
        "tests/test_settlements.py",
    ),
    Mutant(
        "retry without jitter",
        "jobsys/middleware.py",
        "        super().after_process_message(broker, message, result=result, exception=exception)\n\n\nclass DeadLetters",
        "        super().after_process_message(broker, message, result=result, exception=exception)\n"
        "        message.retry_delay = message.retry_delay and 2.0 ** int(message.retry_delay).bit_length()\n\n\nclass DeadLetters",
        "tests/test_retries.py",
    ),
    Mutant(
        "idempotency by looking first",
        "sql/queue.sql",
        "on conflict (idempotency_key) where idempotency_key is not null do nothing",
        "where not exists (select from jobs where jobs.idempotency_key = described.idempotency_key)",
        "tests/test_races.py -k key",
    ),
    Mutant(
        "pace by each worker's own clock",
        "jobsys/claims.py",
        "            if rows and paced:\n",
        "            time.sleep(0.2 if rows else 0)\n            if rows and paced and not types:\n",
        "tests/test_worker.py -k paced_queue_keeps_its_pace_over_all",
    ),
    Mutant(
        "the CSV straight to its name",
        "jobsys/jobs/csv_export.py",
        '    try:\n        with open(temporary, "xb") as file:',
        '    with open(path, "wb") as file:\n        yield file\n    return\n    try:\n        with open(temporary, "xb") as file:',
        "tests/test_csv_export.py -k 'killed or stopped'",
    ),
    Mutant(
        "jobs start before they are due",
        "sql/queue.sql",
        "where status = 'SCHEDULED' and run_at <= statement_timestamp()",
        "where status = 'SCHEDULED' and run_at <= statement_timestamp() + interval '10 seconds'",
        "tests/test_queue.py tests/test_worker.py -k 'scheduled or delayed_job'",
    ),
    Mutant(
        "a paused queue goes on",
        "sql/schema.sql",
        "(paused or rate_count is not null or max_running is not null)",
        "(rate_count is not null or max_running is not null)",
        "tests/test_queue.py -k paused",
    ),
    Mutant(
        "a job that completed itself is finished again",
        "jobsys/running.py",
        "        self.completing = True\n",
        "",
        "tests/test_complete_in.py -k 'together'",
    ),
    Mutant(
        "a type may take every thread",
        "jobsys/bulkheads.py",
        "return max(1, int(self._threads * job_type.max_share))",
        "return self._threads",
        "tests/test_worker.py -k hangs_leaves",
    ),
    Mutant(
        "every worker that sleeps is told of a job",
        "sql/schema.sql",
        "                then 4\n",
        "                then 400\n",
        "tests/test_queue.py -k a_few_are_told",
    ),
    Mutant(
        "few are told of a job that is committed late",
        "sql/schema.sql",
        "when statement_timestamp() = transaction_timestamp()\n",
        "when true\n",
        "tests/test_queue.py -k a_few_are_told",
    ),
    Mutant(
        "a claim that may have left some tells nobody",
        "sql/schema.sql",
        "    if cardinality(found_ids) = most then\n",
        "    if false then\n",
        "tests/test_queue.py -k may_have_left_some",
    ),
    Mutant(
        "a notification that comes with an answer is not heard",
        "jobsys/heart.py",
        "listening.poll(wait * 1000)):\n                self._connection.poll()\n",
        "listening.poll(1000)):\n                self._connection.poll()\n            else:\n                return\n",
        "tests/test_worker.py -k comes_with_the_answer",
    ),
]


def broken(mutant: Mutant, text: str) -> str:
    """The file's text with the mutant in it. Raises ValueError when there is no such line, or more than one."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has the line {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def survives(mutant: Mutant) -> bool:
    """Whether no test notices."""
    with tempfile.TemporaryDirectory(prefix="jobsys-mutant-") as directory:
        copy = Path(directory) / "checkout"
        shutil.copytree(
            CHECKOUT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "var", "output", "__pycache__", ".*_cache")
        )
        file = copy / mutant.file
        file.write_text(broken(mutant, file.read_text(encoding="utf-8")), encoding="utf-8")
        command = f'"{sys.executable}" -m pytest -n 0 -x -q -p no:cacheprovider {mutant.tests}'
        done = subprocess.run(command, shell=True, cwd=copy, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """1 when one survived."""
    survivors = []
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            alive = survives(mutant)
            survivors += [mutant] if alive else []
            print(f"{'SURVIVED' if alive else 'caught  '}  {mutant.name} ({mutant.file})", flush=True)
    print(f"{len(survivors)} survived" if survivors else "all were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
