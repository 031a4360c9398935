"""graphile-worker with its local queue and completion in batches. It keeps no history."""

from __future__ import annotations

from tests.benchmarks.harness import execute
from tests.benchmarks.peers.node import NodePeer


class GraphileWorker(NodePeer):
    distribution = "graphile-worker"
    script = "graphile_worker.js"
    tuning = "concurrentJobs 24, localQueue 500, completeJobBatchDelay 0"
    fill = """
        select count(*) from graphile_worker.add_jobs(
            array(select json_populate_record(null::graphile_worker.job_spec, '{"identifier": "noop"}') from generate_series(1, %s))
        )
    """
    unfinished = "select exists (select from graphile_worker._private_jobs)"
    span = "select max(last) - min(first) from bench_span"

    def install(self, url: str) -> None:
        super().install(url)
        execute(url, "create table bench_span (first float8, last float8)")


PEER = GraphileWorker()
