"""One worker process of a peer: `python -m tests.benchmarks.peers MODULE URL`."""

from __future__ import annotations

import importlib
import sys

importlib.import_module(sys.argv[1]).main(sys.argv[2])
