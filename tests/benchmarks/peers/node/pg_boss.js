// One worker process: node pg_boss.js URL.
import { PgBoss } from "pg-boss";

const [connectionString, only] = process.argv.slice(2);
const boss = new PgBoss({ connectionString, max: 10 });
boss.on("error", console.error);
await boss.start();
if (only === "migrate") {
  await boss.createQueue("noop");
  await boss.stop();
} else {
  // one call for 500 jobs; of 1, 2 and 4 at a time 2 drained fastest here
  await boss.work("noop", { batchSize: 500, localConcurrency: 2, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 }, async () => {});
  process.on("SIGTERM", async () => {
    await boss.stop();
    process.exit(0);
  });
}
