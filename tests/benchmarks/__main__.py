"""Runs the measurements named on the command line, or all, and prints a table in Markdown."""

from __future__ import annotations

import sys

from tests.benchmarks import drain, latency, submit
from tests.benchmarks.harness import bench, machine

PARTS = {"drain": drain.measure, "submit": submit.measure, "latency": latency.measure}


def main() -> int:
    """0, or 2 when a name is none of the parts."""
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        print(f"{', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    with bench() as place:
        print(f"Measured on {machine(place.server)}.\n\n| | |\n| --- | ---: |")
        for name in names:
            for what, value, unit in PARTS[name](place):
                print(f"| {what} | {value:,.{0 if value > 100 else 2}f} {unit} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
