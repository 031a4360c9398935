"""Breaks things on purpose, on processes of its own, and compares what was promised with what happened.

jobs.py     the job type, which writes what it does into a file
ledger.py   what was accepted, what ran, what is in the database: compared
proxy.py    a TCP proxy before PostgreSQL that cuts, delays, swallows
stage.py    worker processes and a stream of jobs
faults.py   what is broken, each for some seconds
report.py   what came of it
"""

QUEUE = "jobsys.chaos"
LEDGERS = "JOBSYS_CHAOS_LEDGERS"
"""The variable that says in which directory jobs write; nothing is written elsewhere."""
CLOCK = "JOBSYS_CHAOS_CLOCK"
"""The variable that says by how many seconds a worker process's clock is to be wrong."""
