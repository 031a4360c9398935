-- The broker's statements. Each begins with `-- name: …` and ends with the next name; %(x)s are psycopg2's bound parameters.
-- What a worker writes names the id and the claim it holds, and returns the ids it changed: an id that is missing was lost.

-- name: submit_one
-- One job that is due now and has no key.
select submit_job(
    %(id)s, %(type)s, %(queue)s, %(priority)s::smallint, %(payload)s, %(options)s, %(max_attempts)s::integer, %(group_id)s
);

-- name: submit
-- Some jobs that are due now and have no key, a row for each. What it leaves out has defaults: a shorter statement, because reading and
-- planning it is a good part of its cost. (By arrays, as in submit_many, four jobs cost PostgreSQL three quarters more.)
insert into jobs (id, type, queue, priority, payload, options, max_attempts, group_id)
values {rows}
returning id::text, status, run_at, created_at;

-- name: submit_many
-- Any jobs, some hundreds at once. A key that is taken inserts nothing: `find_idempotent` then tells what it is.
insert into jobs (id, type, queue, priority, payload, options, status, max_attempts, run_at, group_id, idempotency_key)
select
    id, type, queue, priority, payload, options,
    case when due > clock_timestamp() then 'SCHEDULED' else 'PENDING' end::job_status,
    max_attempts, coalesce(due, clock_timestamp()), group_id, idempotency_key
from (
    select job.*, coalesce(job.run_at, clock_timestamp() + job.delay * interval '1 second') as due
    from unnest(
        %(id)s::uuid[], %(type)s::text[], %(queue)s::text[], %(priority)s::smallint[], %(payload)s::jsonb[], %(options)s::jsonb[],
        %(max_attempts)s::integer[], %(run_at)s::timestamptz[], %(delay)s::float8[], %(group_id)s::uuid[], %(idempotency_key)s::text[]
    ) as job(id, type, queue, priority, payload, options, max_attempts, run_at, delay, group_id, idempotency_key)
) as described
on conflict (idempotency_key) where idempotency_key is not null do nothing
returning id::text, status, run_at, created_at;

-- name: stream
-- Any number of jobs that are due now.
copy jobs (id, type, queue, priority, payload, options, max_attempts, group_id) from stdin;

-- name: claim
-- From free queues: schema.sql says what it promises.
select * from claim_jobs(
    %(worker)s::uuid, %(types)s, %(queues)s, %(priorities)s::smallint[], %(from_run_at)s::timestamptz[], %(from_id)s::uuid[], %(n)s,
    %(turn)s, %(ahead_of)s::smallint
);

-- name: turn_hangs
-- Has somebody had the turn of this queue's large claims for so long that something must be wrong? (Where nobody may see since when, or it is not
-- tracked, `for_long` says whether to believe so.)
select coalesce(
    bool_or(coalesce(xact_start < clock_timestamp() - %(seconds)s * interval '1 second', state is distinct from 'idle' and %(for_long)s)),
    false
)
from pg_locks join pg_stat_activity using (pid)
where locktype = 'advisory' and granted
    and database = (select oid from pg_database where datname = current_database())
    and classid = 'jobs'::regclass and objid = (hashtext(%(queue)s)::bigint & 4294967295)::oid and objsubid = 2;

-- name: look_at_gate
-- Before waiting for a free thread: is there a job for it, and may one start? No row while the queue is paused or empty; else the
-- seconds until the next start is allowed, or until it is worth looking again whether the queue is still full.
select greatest(
    extract(epoch from next_start_at - clock_timestamp()),
    case when max_running <= (select count(*) from jobs where status = 'PROCESSING' and queue = %(queue)s) then 0.1 else 0 end
)::float8
from queues
where name = %(queue)s
    and not paused
    and exists (select from jobs where status = 'PENDING' and queue = %(queue)s and type = any(%(types)s));

-- name: open_gate
-- The limits of one queue, locked until the claim that spends them commits; no row when somebody else holds the lock. Room is what
-- max_running leaves; the count is taken by the next statement, whose snapshot is newer than this lock.
select
    paused,
    max_running,
    rate_count is not null,
    greatest(extract(epoch from next_start_at - clock_timestamp()), 0)::float8
from queues
where name = %(queue)s
for update skip locked;

-- name: count_running
select count(*) from jobs where status = 'PROCESSING' and queue = %(queue)s;

-- name: claim_limited
-- The same as claim, for whoever holds the gate. (The step is random here, too: a database that was restored has forgotten claims.)
update jobs
set status = 'PROCESSING', attempt = attempt + 1, claim = claim + 1 + (random() * 2147483647)::bigint, started_at = clock_timestamp(),
    worker = %(worker)s::uuid, progress = null
where id = any(array(
    select id
    from jobs
    where status = 'PENDING' and queue = %(queue)s and type = any(%(types)s)
        and exists (select from workers where workers.id = %(worker)s::uuid and heartbeat_at > '-infinity')
    order by priority, run_at, id
    limit %(n)s
    for update skip locked
))
returning id::text, type, priority, payload::text, options::text, attempt, claim, max_attempts, (run_at at time zone 'UTC')::text,
    (date_part('epoch', clock_timestamp() - created_at) * 1000)::bigint, crashes, queue, date_part('epoch', clock_timestamp() - run_at);

-- name: spend_start
-- The next start of a paced queue is one spacing after the one just claimed.
update queues
set next_start_at = clock_timestamp() + rate_period / rate_count
where name = %(queue)s and rate_count is not null
returning extract(epoch from rate_period / rate_count)::float8;

-- name: other_priorities
-- The priorities that wait in a queue besides the named ones: an index probe between each two of these and one for each that is there. (Nothing is read
-- of the named ones, where thousands of entries of jobs that were just claimed may lie.)
with recursive present as (
    select first.priority, gap.below
    from unnest(array[-32769] || %(named)s::integer[], %(named)s::integer[] || array[32768]) as gap(above, below)
    cross join lateral (
        select jobs.priority from jobs
        where status = 'PENDING' and queue = %(queue)s and jobs.priority > gap.above and jobs.priority < gap.below
        order by jobs.priority limit 1
    ) as first
    union all
    select next.priority, present.below
    from present
    cross join lateral (
        select jobs.priority from jobs
        where status = 'PENDING' and queue = %(queue)s and jobs.priority > present.priority and jobs.priority < present.below
        order by jobs.priority limit 1
    ) as next
)
select priority from present;

-- name: waiting_queues
-- In which of these queues does anything wait? (The order leaves the planner no other way than the index. To find just any row it may read the table
-- from its start, which costs it nothing in its own eyes, and a lot where there is none.)
select looked_at.queue
from unnest(%(queues)s::text[]) as looked_at(queue)
cross join lateral (select from jobs where status = 'PENDING' and jobs.queue = looked_at.queue order by priority, run_at, id limit 1) as any_job;

-- name: limited_queues
select name from queues where paused or rate_count is not null or max_running is not null;

-- name: finish
select finish_jobs(%(id)s::uuid[], %(claim)s::bigint[], %(result)s::jsonb[])::text;

-- name: free
-- Which of these jobs are there, and which of them has nobody locked? Those are locked now.
with free as (
    select id from jobs where id = any(%(id)s::uuid[]) for update skip locked
)
select jobs.id::text, free.id is not null from jobs left join free using (id) where jobs.id = any(%(id)s::uuid[]);

-- name: completed
-- Is the job there, and has this attempt completed?
select status = 'COMPLETED' and claim = %(claim)s from jobs where id = %(id)s;

-- name: retry
-- A failed attempt that will be followed by another after `delay` seconds; unless somebody asked for a stop meanwhile.
with failed as (
    select * from unnest(
        %(id)s::uuid[], %(claim)s::bigint[], %(worker)s::uuid[], %(delay)s::float8[], %(options)s::jsonb[],
        %(type)s::text[], %(message)s::text[], %(traceback)s::text[], %(fingerprint)s::text[]
    ) as failed(id, claim, worker, delay, options, type, message, traceback, fingerprint)
), changed as (
    update jobs
    set status = case
            when stop_requested is not null then 'CANCELLED'
            when failed.delay > 0 then 'SCHEDULED'
            else 'PENDING'
        end::job_status,
        finished_at = case when stop_requested is not null then clock_timestamp() end,
        run_at = clock_timestamp() + failed.delay * interval '1 second',
        worker = case when stop_requested is not null then jobs.worker end,
        options = failed.options,
        error = jsonb_build_object('type', failed.type, 'message', failed.message, 'attempt', attempt, 'at', clock_timestamp())
    from failed
    where jobs.id = failed.id and jobs.claim = failed.claim and jobs.status::text = 'PROCESSING'  -- ::text as in finish_jobs
    returning jobs.id, jobs.queue, jobs.type, jobs.status, failed.claim, attempt, started_at, failed.worker,
        failed.type as error_type, failed.message, failed.traceback, failed.fingerprint
), counted as (
    insert into tally_log (queue, type, status, entered, departed)
    select queue, type, 'RETRIED', count(*), 0 from changed where status <> 'CANCELLED' group by queue, type
), kept as (
    insert into failures (job_id, claim, attempt, started_at, worker, type, message, traceback, fingerprint)
    select id, claim, attempt, started_at, worker, error_type, message, traceback, fingerprint from changed
)
select id::text from changed;

-- name: bury
-- A failed attempt that was the last: FAILED, or DEAD when the job could not be run at all.
with failed as (
    select * from unnest(
        %(id)s::uuid[], %(claim)s::bigint[], %(status)s::text[], %(options)s::jsonb[],
        %(type)s::text[], %(message)s::text[], %(traceback)s::text[], %(fingerprint)s::text[]
    ) as failed(id, claim, status, options, type, message, traceback, fingerprint)
), changed as (
    update jobs
    set status = failed.status::job_status,
        finished_at = clock_timestamp(),
        options = failed.options,
        error = jsonb_build_object('type', failed.type, 'message', failed.message, 'attempt', attempt, 'at', clock_timestamp())
    from failed
    where jobs.id = failed.id and jobs.claim = failed.claim and jobs.status::text = 'PROCESSING'
    returning jobs.id, failed.claim, attempt, started_at, finished_at, worker, failed.type, failed.message, failed.traceback, failed.fingerprint
), kept as (
    insert into failures (job_id, claim, attempt, started_at, at, worker, type, message, traceback, fingerprint)
    select id, claim, attempt, started_at, finished_at, worker, type, message, traceback, fingerprint from changed
)
select id::text from changed;

-- name: release
-- Back to the queue as the same attempt: claimed and not started, or interrupted by a shutdown. A requested stop wins.
with given as (
    select * from unnest(%(id)s::uuid[], %(claim)s::bigint[]) as given(id, claim)
), changed as (
    update jobs
    set status = case when stop_requested is null then 'PENDING' else 'CANCELLED' end::job_status,
        finished_at = case when stop_requested is not null then clock_timestamp() end,
        attempt = attempt - 1,
        worker = null
    from given
    where jobs.id = given.id and jobs.claim = given.claim and jobs.status::text = 'PROCESSING'
    returning jobs.id
)
select id::text from changed;

-- name: cancel_running
-- The end of a job that was asked to stop, and did.
update jobs
set status = 'CANCELLED', finished_at = clock_timestamp()
from unnest(%(id)s::uuid[], %(claim)s::bigint[]) as stopped(id, claim)
where jobs.id = stopped.id and jobs.claim = stopped.claim and jobs.status::text = 'PROCESSING'
returning jobs.id::text;

-- name: report
-- What running jobs had to say: the latest progress of each, and lines for the timeline.
with running as (
    select jobs.id, latest.progress
    from unnest(%(id)s::uuid[], %(claim)s::bigint[], %(progress)s::jsonb[]) as latest(id, claim, progress)
    join jobs on jobs.id = latest.id and jobs.claim = latest.claim and jobs.status::text = 'PROCESSING'
    for update of jobs skip locked  -- who ends one just now has no use for its progress
), told as (
    update jobs set progress = running.progress from running where jobs.id = running.id
)
insert into events (job_id, at, kind, attempt, message)
select line.job_id, clock_timestamp() - line.ago * interval '1 second', line.kind, line.attempt, line.message
from unnest(%(job_id)s::uuid[], %(ago)s::float8[], %(kind)s::text[], %(attempt)s::integer[], %(message)s::text[])
    as line(job_id, ago, kind, attempt, message)
where exists (select from jobs where jobs.id = line.job_id);

-- name: unheld
-- Jobs that name this worker, which does not know of them: the claim was committed, and its answer lost on the way. `held` is what the worker has;
-- a claim younger than ten seconds may be on its way still.
select id::text, claim
from jobs
where status = 'PROCESSING' and worker = %(worker)s::uuid and started_at < clock_timestamp() - interval '10 seconds'
    and not id = any(%(held)s::uuid[]);

-- name: stop_requests
-- Which of this worker's jobs were asked to stop?
select id::text, claim from jobs where status = 'PROCESSING' and worker = %(worker)s::uuid and stop_requested is not null;

-- name: promote
-- Scheduled jobs that fell due become PENDING, a thousand at a time, the longest due first. (statement_timestamp, because an index is not
-- searched for what a volatile function says.)
update jobs
set status = 'PENDING'
where id = any(array(
    select id from jobs
    where status = 'SCHEDULED' and run_at <= statement_timestamp()
    order by run_at
    limit 1000
    for update skip locked
))
returning queue;

-- name: next_due
-- Seconds until the next scheduled job falls due; null when none is scheduled.
select extract(epoch from run_at - clock_timestamp())::float8 from jobs where status = 'SCHEDULED' order by run_at limit 1;

-- name: register_worker
-- "Here I am." And how many are we?
insert into workers (id, host, pid, version, queues, types, threads, heartbeat, lost_after, session_pid, session_start)
values (
    %(id)s, %(host)s, %(pid)s, %(version)s, %(queues)s, %(types)s, %(threads)s,
    %(heartbeat)s * interval '1 second', %(lost_after)s * interval '1 second',
    pg_backend_pid(), (select backend_start from pg_stat_get_activity(pg_backend_pid()))
)
returning (select count(*) + 1 from workers);

-- name: declare_types
-- What is there already is not locked: many processes may start at once.
insert into job_types (name, queue, priority, max_attempts)
select * from unnest(%(name)s::text[], %(queue)s::text[], %(priority)s::smallint[], %(max_attempts)s::integer[])
    as declared(name, queue, priority, max_attempts)
where not exists (
    select from job_types as known
    where known.name = declared.name
        and (known.queue, known.priority, known.max_attempts) is not distinct from (declared.queue, declared.priority, declared.max_attempts)
)
order by name
on conflict (name) do update
set queue = excluded.queue, priority = excluded.priority, max_attempts = excluded.max_attempts
where (job_types.queue, job_types.priority, job_types.max_attempts)
    is distinct from (excluded.queue, excluded.priority, excluded.max_attempts);

-- name: beat
-- "I live, and this is my session." And how many are we? No row: this worker was declared lost, its jobs are no longer its own.
update workers
set heartbeat_at = clock_timestamp(),
    suspect = %(suspect)s::uuid,
    held_back = %(held_back)s,
    session_pid = pg_backend_pid(),
    session_start = (select backend_start from pg_stat_get_activity(pg_backend_pid()))
where id = %(id)s
returning (select count(*) from workers);

-- name: run_alone
-- Said before a suspect starts, and taken back (null) when it has ended.
update workers set suspect = %(job)s::uuid where id = %(id)s returning id::text;

-- name: sleep
-- From here on whoever makes a job of this queue due may send this worker a notification. Look once more before waiting for it.
update workers set asleep = array_append(asleep, %(queue)s) where id = %(id)s and not %(queue)s = any(asleep);

-- name: be_busy
-- From here on whoever makes a job due that is more urgent than this may send a notification; null: only sleepers want any.
update workers set busy_above = %(above)s where id = %(id)s;

-- name: wake
update workers set asleep = array_remove(asleep, %(queue)s) where id = %(id)s and %(queue)s = any(asleep);

-- name: leave_in_peace
-- A worker that is about to end wants to hear of no more jobs. No row: its claims are just saying something of it, so to be tried again.
update workers set asleep = '{}', busy_above = null
where id = any(array(select id from workers where id = %(id)s for update skip locked))
returning id::text;

-- name: pass_on
-- This worker was told of a job, and can't take it.
select tell_others(%(queue)s, %(id)s::uuid, 1);

-- name: be_occupied
update workers set occupied = %(occupied)s where id = %(id)s;

-- name: report_death
-- Said by a supervisor that saw its worker process die: nobody has to wait for its heart. Another machine may have a process of the same
-- name and number: whose session is there is not dead. And whoever has the row locked is at the rescue already, or stuck in it.
update workers
set heartbeat_at = '-infinity'
where id = any(array(
    select id from workers
    where host = %(host)s and pid = %(pid)s
        and not exists (select from pg_stat_get_activity(session_pid) as session where session.backend_start = workers.session_start)
    for update skip locked
))
returning id::text;

-- name: unregister_worker
-- A worker that has given everything back leaves; one that has not is left to the rescue.
delete from workers
where id = %(id)s and not exists (select from jobs where status = 'PROCESSING' and worker = %(id)s);

-- name: lost_workers
-- Who is dead? Whoever was silent for too long; and whoever's session is gone and did not come back within a beat and a half.
-- (A reader without the right to see other roles' sessions sees a null start, and then waits for the silence.) Silence counts only for a
-- reader who has had the database for a while: after an outage everybody was silent, and nobody need be dead. A reported death counts at once.
select id::text
from workers
where heartbeat_at = '-infinity'
    or %(silence_counts)s and (
        heartbeat_at < clock_timestamp() - lost_after
        or heartbeat_at < clock_timestamp() - heartbeat * 1.5
            and not exists (
                select from pg_stat_get_activity(session_pid) as session
                where session.backend_start is null or session.backend_start = workers.session_start
            )
    );

-- name: lock_lost_worker
-- One rescuer at a time for one lost worker, and only if it did not beat again meanwhile.
select id::text from workers
where id = %(id)s and heartbeat_at < clock_timestamp() - least(lost_after, heartbeat * 1.5)
for update skip locked;

-- name: rescue
-- The jobs of a lost worker, some hundreds at a time: back to the queue, or DEAD when they were there at too many deaths. One of them is
-- perhaps the killer: a suspect, whose next crash would be its last, runs alone, and the worker says so before. So when it is said,
-- that one crashed and no other did; else the suspects were waiting, and all others count as running. A job that somebody has locked
-- is just being ended (complete_in may take its time): the next rescue looks at it again.
with mine as (
    select
        jobs.id, attempt, claim, jobs.started_at,
        case
            when workers.suspect is not null then jobs.id = workers.suspect
            else not (crashes > 0 and crashes + 1 >= %(max_crashes)s)
        end as crashed
    from jobs left join workers on workers.id = jobs.worker
    where status = 'PROCESSING' and worker = %(worker)s::uuid
    order by jobs.id
    limit 500
    for update of jobs skip locked
), ends as (
    select mine.*, crashed and crashes + 1 >= %(max_crashes)s as dead from mine join jobs using (id)
), changed as (
    update jobs
    set status = case
            when stop_requested is not null then 'CANCELLED'
            when dead then 'DEAD'
            else 'PENDING'
        end::job_status,
        finished_at = case when stop_requested is not null or dead then clock_timestamp() end,
        worker = case when stop_requested is not null or dead then jobs.worker end,
        crashes = crashes + crashed::integer,
        error = jsonb_build_object('type', 'WorkerLost', 'message', %(message)s::text, 'attempt', jobs.attempt, 'at', clock_timestamp())
    from ends
    where jobs.id = ends.id
    returning jobs.id, ends.attempt, ends.claim, ends.started_at, jobs.status
), kept as (
    insert into failures (job_id, claim, attempt, started_at, worker, type, message, traceback, fingerprint)
    select id, claim, attempt, started_at, %(worker)s::uuid, 'WorkerLost', %(message)s, '', 'WorkerLost' from changed
)
select id::text, status from changed;

-- name: orphans
-- Workers that are named by a running job and have no row: nobody would rescue their jobs.
select distinct jobs.worker::text from jobs
where jobs.status = 'PROCESSING' and not exists (select from workers where workers.id = jobs.worker);

-- name: forget_worker
-- Counted here and not in memory: whoever is at the rescue may be the next to die.
with gone as (
    delete from workers
    where id = %(id)s and not exists (select from jobs where status = 'PROCESSING' and worker = %(id)s)
    returning queues
)
insert into tally_log (queue, type, status, entered, departed) select coalesce(queues[1], ''), '', 'WORKERS_LOST', 1, 0 from gone;

-- name: remove_stopped
delete from jobs where stop_requested = 'remove' and finished_at is not null;

-- name: prune
-- Finished jobs past their retention, oldest first, a thousand at a time, from where the last call ended.
with page as (
    select id, finished_at from jobs
    where id > %(after)s::uuid
        -- Ids of version 7 begin with the time, which bounds the walk to what is old enough; a day of margin for other clocks. (Who inserts
        -- with ids of another kind has to remove those jobs himself.)
        and id < overlay(
            '00000000-0000-7000-8000-000000000000' placing regexp_replace(
                lpad(to_hex((extract(epoch from statement_timestamp() - (%(days)s - 1) * interval '1 day') * 1000)::bigint), 12, '0'),
                '(.{8})(.{4})', '\1-\2'
            ) from 1 for 13
        )::uuid
        and created_at < clock_timestamp() - %(days)s * interval '1 day'
    order by id
    limit 1000
), gone as (
    -- Both times: the second is asked again of a job that an operator put back into the queue just now.
    delete from jobs
    where id = any(array(select id from page where finished_at < clock_timestamp() - %(days)s * interval '1 day'))
        and finished_at < clock_timestamp() - %(days)s * interval '1 day'
    returning id
)
select (select max(id::text) from page), (select count(*) from page), (select count(*) from gone);

-- name: prune_revocations
-- No token lives longer than 366 days.
delete from revocations where at < clock_timestamp() - interval '367 days';

-- name: prune_logins
-- Whoever tries a password has several of these locked: that one is neither waited for, nor made to wait.
delete from logins
where key = any(array(
    select key from logins
    where coalesce(right_at, '-infinity') < clock_timestamp() - interval '30 days'
        and not exists (select from unnest(wrong_at) as at where at > clock_timestamp() - interval '1 minute')
    for update skip locked
));

-- name: sum_tallies
-- What the log holds moves into the sums. Two at once share the log between them; a reader sees both or neither.
with moved as (
    delete from tally_log where ctid = any(array(select ctid from tally_log limit 10000 for update skip locked))
    returning *
), summed as (
    select queue, type, status, sum(entered) as entered, sum(departed) as departed
    from (
        select queue, type, status, entered, departed from moved
        union all
        select queue, type, 'CREATED', created, 0 from moved where created > 0
    ) as moves
    group by queue, type, status
    order by queue, type, status
)
insert into tallies as total (queue, type, status, entered, departed)
select queue, type, status, entered, departed from summed
on conflict (queue, type, status) do update
set entered = total.entered + excluded.entered, departed = total.departed + excluded.departed;

-- name: add_measurements
-- In one order, so that processes which add to the same rows wait for one another and never both.
insert into measurements as total (metric, labels, buckets, sum)
select metric, labels, buckets::bigint[], sum
from unnest(%(metric)s::text[], %(labels)s::jsonb[], %(buckets)s::text[], %(sum)s::float8[]) as measured(metric, labels, buckets, sum)
order by metric, labels
on conflict (metric, labels) do update
set buckets = array(
        select coalesce(had, 0) + coalesce(came, 0)
        from unnest(total.buckets, excluded.buckets) with ordinality as bucket(had, came, number)
        order by number
    ),
    sum = total.sum + excluded.sum;

-- name: tell_pools
-- And what others said, who have been silent for long, goes.
with silent as (
    delete from process_pools
    where (process, name) in (
        select process, name from process_pools where good_until < clock_timestamp() - interval '1 minute' for update skip locked
    )
)
insert into process_pools (process, kind, name, size, in_use, idle, good_until)
select %(process)s::uuid, %(kind)s, name, size, in_use, idle, clock_timestamp() + %(good_for)s * interval '1 second'
from unnest(%(name)s::text[], %(size)s::integer[], %(in_use)s::integer[], %(idle)s::integer[]) as pool(name, size, in_use, idle)
on conflict (process, name) do update
set size = excluded.size, in_use = excluded.in_use, idle = excluded.idle, good_until = excluded.good_until;

-- name: forget_pools
delete from process_pools where process = %(process)s::uuid;

-- name: count_requests
select client, used, seconds_left from count_requests(%(clients)s, %(numbers)s, %(period)s * interval '1 second');

-- name: prune_rate_limits
-- Clients whose window is over, a bounded number at a time.
delete from rate_limits
where client = any(array(select client from rate_limits where ends_at < clock_timestamp() limit 10000 for update skip locked))
returning 1;

-- name: set_limits
-- Where they are so already nothing is locked, as above.
insert into queues (name, rate_count, rate_period, max_running)
select wanted.*
from (select %(queue)s::text, %(rate_count)s::integer, %(rate_period)s * interval '1 second', %(max_running)s::integer)
    as wanted(name, rate_count, rate_period, max_running)
where not exists (
    select from queues as known
    where known.name = wanted.name
        and (known.rate_count, known.rate_period, known.max_running)
            is not distinct from (wanted.rate_count, wanted.rate_period, wanted.max_running)
)
on conflict (name) do update
set rate_count = excluded.rate_count, rate_period = excluded.rate_period, max_running = excluded.max_running
where (queues.rate_count, queues.rate_period, queues.max_running)
    is distinct from (excluded.rate_count, excluded.rate_period, excluded.max_running);

-- name: drop_waiting
-- Dramatiq's flush: the waiting jobs of a queue are gone.
delete from jobs where queue = %(queue)s and status in ('PENDING', 'SCHEDULED');

-- name: unfinished
-- Dramatiq's join: is anything left to do in this queue?
select exists (select from jobs where queue = %(queue)s and status = 'PENDING')
    or exists (select from jobs where queue = %(queue)s and status = 'SCHEDULED')
    or exists (select from jobs where queue = %(queue)s and status = 'PROCESSING');

-- name: result
-- Dramatiq's results: how the job stands, and what it returned.
select status, result::text, error::text from jobs where id = %(id)s;
