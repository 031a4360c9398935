// One worker process: node graphile_worker.js URL. Finished jobs leave its tables, so it notes itself when its first began and its last ended.
import { Pool } from "pg";

process.env.NO_LOG_SUCCESS = "1"; // it has a line for each job
const { run, runMigrations } = await import("graphile-worker");

const [connectionString, only] = process.argv.slice(2);
// as its page on performance says; of local queues of 100, 500 and 1000 jobs 500 drained fastest here
const worker = { connectionString, concurrentJobs: 24, maxPoolSize: 25, localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 };

if (only === "migrate") {
  await runMigrations({ preset: { worker } });
} else {
  let first, last;
  const noop = async () => {
    last = Date.now();
    first ??= last;
  };
  const runner = await run({ preset: { worker }, taskList: { noop }, parsedCronItems: [], noHandleSignals: true });
  process.on("SIGTERM", async () => {
    await runner.stop();
    if (first) {
      const pool = new Pool({ connectionString });
      await pool.query("insert into bench_span values ($1, $2)", [first / 1000, last / 1000]);
      await pool.end();
    }
    process.exit(0);
  });
}
