"""Jobs posted with a rate limit that is never reached, as a share of those posted without one: by one client, and by a thousand."""

from __future__ import annotations

import contextlib
from functools import partial
from statistics import median

from tests.benchmarks.harness import Bench, alternate
from tests.benchmarks.posts import CONNECTIONS, post, web
from tests.benchmarks.result import Result

UNIT = "share"
CLIENTS = 1000
NEVER_REACHED = {"RATE_LIMIT": "100000000/minute", "TRUSTED_PROXIES": "127.0.0.1"}


def measure(bench: Bench) -> Result:
    """The median of the shares with one client; details have that with a thousand clients, and the rates."""
    seconds = bench.sized(2, quick=1, full=10)
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(bench.system())
        without, _ = stack.enter_context(web(system, TRUSTED_PROXIES="127.0.0.1"))
        limited, _ = stack.enter_context(web(system, **NEVER_REACHED))
        for port in (without, limited):
            post(port, 1)
        ways = {"one client": 0, f"{CLIENTS} clients": CLIENTS}
        ports = {"without": without, "limited": limited}
        contenders = {
            f"{name}, {way}": partial(posted, port, seconds, clients) for way, clients in ways.items() for name, port in ports.items()
        }
        rates = alternate(contenders, bench.runs * 4)
    shares = {way: [on / off for on, off in zip(rates[f"limited, {way}"], rates[f"without, {way}"], strict=True)] for way in ways}
    details = {"connections": CONNECTIONS, "seconds": seconds, "rates": {name: median(values) for name, values in rates.items()}}
    return Result.of_runs(
        UNIT, {"jobsys": shares["one client"]}, **details, **{f"with {CLIENTS} clients": median(shares[f"{CLIENTS} clients"])}
    )


def posted(port: int, seconds: int, clients: int) -> float:
    """Posts a second."""
    return post(port, seconds, clients=clients)["rate"]
