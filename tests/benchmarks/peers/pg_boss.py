"""pg-boss with a call for 500 jobs."""

from __future__ import annotations

from tests.benchmarks.peers.node import NodePeer


class PgBoss(NodePeer):
    distribution = "pg-boss"
    script = "pg_boss.js"
    tuning = "batchSize 500, localConcurrency 2, burstWhenBatchFull"
    fill = "insert into pgboss.job (name) select 'noop' from generate_series(1, %s)"
    unfinished = "select exists (select from pgboss.job where name = 'noop' and state <= 'active')"
    span = "select extract(epoch from max(completed_on) - min(started_on)) from pgboss.job where name = 'noop'"


PEER = PgBoss()
