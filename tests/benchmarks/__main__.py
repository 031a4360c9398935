"""Runs the measurements named on the command line, or the usual ones, and prints a table in Markdown, or JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time

from tests.benchmarks.harness import FULL, QUICK, USUAL, bench, machine, tell, versions
from tests.benchmarks.result import TABLE_HEAD, Result

PARTS = [
    "drain",
    "latency",
    "urgent",
    "due",
    "submit",
    "bulk",
    "http",
    "flat",
    "snapshot",
    "processes",
    "memory",
    "real",
]
LONGER = ["limit", "waiting", "prune", "steady"]
"""They have no peers, and take as long as all the others do."""
LIBRARIES = [
    "dramatiq",
    "psycopg2-binary",
    "pgqueuer",
    "asyncpg",
    "uvloop",
    "procrastinate",
    "chancy",
    "psycopg",
    "dramatiq-pg",
    "falcon",
    "gunicorn",
]


def main() -> int:
    """0; 2 when the command line is wrong; 1 when a part failed, and then the others are printed all the same."""
    asked = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    names = asked.names or (PARTS + LONGER if asked.full else PARTS)
    results: dict[str, Result] = {}
    with bench(FULL if asked.full else QUICK if asked.quick else USUAL) as place:
        on = machine(place.server)
        for name in names:
            tell(f"{name}: {importlib.import_module(f'tests.benchmarks.{name}').__doc__}")
            began = time.monotonic()
            try:
                results[name] = importlib.import_module(f"tests.benchmarks.{name}").measure(place)
            except Exception as error:
                tell(f"{name} failed: {type(error).__name__}: {error}")
            tell(f"  {name} took {time.monotonic() - began:.0f} s")
    if asked.json:
        objects = [
            result.as_json(name) | {"size": place.size, "machine": on, "versions": versions(*LIBRARIES)} for name, result in results.items()
        ]
        if results:
            print(json.dumps(objects[0] if len(names) == 1 else objects))
    else:
        libraries = ", ".join(f"{name} {version}" for name, version in versions(*LIBRARIES).items())
        print(f"Measured on {on}; {libraries}.\n\n{TABLE_HEAD}")
        for name, result in results.items():
            print(result.as_row(name))
    return 0 if len(results) == len(names) else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bin/bench", description="Measures jobsys beside a floor and its peers on the same server.")
    usual, longer = ", ".join(PARTS), ", ".join(LONGER)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"a part, or several; when none is named {usual}, and with --full {longer}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; a list of them when several parts are run")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny sizes and one run each, to see whether it works")
    size.add_argument("--full", action="store_true", help="the sizes that take long, and the parts that do")
    asked = parser.parse_args()
    if unknown := sorted({*asked.names}.difference(PARTS, LONGER)):
        parser.error(f"{', '.join(unknown)}: not one of {usual}, {longer}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
