// The older servers' stack, in two processes: node express.js PORT DATABASE_URL REDIS_PORT. A post is a row, committed, and an entry in Redis.
import cluster from "node:cluster";
import { randomUUID } from "node:crypto";
import express from "express";
import { Queue } from "bullmq";
import { Redis } from "ioredis";
import { Pool } from "pg";

const [port, connectionString, redisPort] = process.argv.slice(2);
const INSERT = "insert into jobs (id, type, priority, payload, max_attempts) values ($1, $2, $3, $4, $5) returning created_at";
const TYPES = new Set(["NOOP"]);

if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
  cluster.on("exit", () => process.exit(1)); // one alone would be measured as if it were two
  process.on("SIGTERM", () => process.exit(0));
} else {
  process.on("disconnect", () => process.exit(0)); // the first process has ended
  const pool = new Pool({ connectionString, max: 16 });
  const queue = new Queue("jobs", { connection: new Redis(Number(redisPort), { maxRetriesPerRequest: null }) });
  const app = express();
  app.disable("x-powered-by");
  app.use(express.json());
  app.get("/health/live", (_, answer) => answer.json({ status: "ok" }));
  app.post("/jobs", async (request, answer) => {
    const { type, payload, priority = 0 } = request.body ?? {};
    if (!TYPES.has(type)) return answer.status(400).json({ error: "unknown type" });
    if (typeof payload !== "object" || payload === null) return answer.status(400).json({ error: "payload must be an object" });
    const id = randomUUID();
    const { rows } = await pool.query(INSERT, [id, type, priority, payload, 4]);
    await queue.add(type, { id, ...payload }, { jobId: id, priority, attempts: 4, backoff: { type: "exponential", delay: 1000 } });
    answer.status(202).json({ id, status: "PENDING", createdAt: rows[0].created_at });
  });
  app.listen(Number(port), "127.0.0.1");
}
