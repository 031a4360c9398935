"""What the peers on Node.js have in common: their packages lie in `node/node_modules`, where bin/bench puts them if there is an npm."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.harness import execute
from tests.benchmarks.peers import Client, Peer

DIRECTORY = Path(__file__).parent / "node"


def version(package: str) -> str:
    """The installed version."""
    return str(json.loads((DIRECTORY / "node_modules" / package / "package.json").read_text())["version"])


def require(*programs: str) -> None:
    """Raises FileNotFoundError, which says what is missing."""
    for name in ("node", *programs):
        if not shutil.which(name):
            raise FileNotFoundError(f"there is no {name} on the PATH")
    if not (DIRECTORY / "node_modules" / "installed").exists():
        raise FileNotFoundError("its packages are not installed; bin/bench does that where there is an npm")


class SqlClient(Client):
    """Submits by a statement of the peer's own that takes their number."""

    def __init__(self, url: str, statement: str) -> None:
        self._url = url
        self._statement = statement

    def submit_many(self, jobs: int) -> None:
        execute(self._url, self._statement, (jobs,))


class NodePeer(Peer):
    """A peer that drains, and does nothing else here; `script` is one worker process, or with `migrate` makes its tables."""

    backlog = 100_000
    script: str
    fill: str
    """A statement that submits so many no-ops."""

    def __init__(self) -> None:
        require()

    @property
    def name(self) -> str:
        return f"{self.distribution} {version(self.distribution)}"

    def install(self, url: str) -> None:
        subprocess.run([*self.command(url), "migrate"], check=True)

    @contextlib.contextmanager
    def client(self, url: str) -> Iterator[Client]:
        yield SqlClient(url, self.fill)

    def command(self, url: str) -> list[str]:
        return ["node", str(DIRECTORY / self.script), url]
