-- Reads, and the operator's verbs. A verb's guard stands in its WHERE and it returns what changed: a lost race is a fact.
-- Every verb leaves a line in `events` with who asked, in the same statement. For many jobs at once they are locked before, by `take`. The
-- status is asked of `target`: of `jobs` it would lead the update to every job of that status, again for each that is meant.

-- name: job
select
    id::text, type, queue, priority, payload, options, status, attempt, max_attempts, run_at, created_at, started_at, finished_at,
    worker::text, result, error, progress, group_id::text, idempotency_key, stop_requested is not null
from jobs
where id = %(id)s;

-- name: unfinished_jobs
-- Who waits for the end of jobs asks this again and again: each is one probe of the primary key.
select id::text from jobs where id = any(%(ids)s::uuid[]) and status < 'COMPLETED';

-- name: jobs
-- One page, newest first. The id is the order of arrival, so a page starts where the last one ended, however far that is.
-- Ordered by the column: a bare `id` would be the text selected above, which no index has in order.
select
    id::text, type, queue, priority, payload, options, status, attempt, max_attempts, run_at, created_at, started_at, finished_at,
    worker::text, result, error, progress, group_id::text, idempotency_key, stop_requested is not null
from jobs
where {conditions}
order by jobs.id desc
limit %(limit)s;

-- name: end_of_part
-- The last of the next so many jobs before one; null when there are fewer.
select (select jobs.id::text from jobs where %(before)s::uuid is null or id < %(before)s::uuid order by jobs.id desc offset %(size)s - 1 limit 1);

-- name: group
select
    id::text, type, queue, priority, payload, options, status, attempt, max_attempts, run_at, created_at, started_at, finished_at,
    worker::text, result, error, progress, group_id::text, idempotency_key, stop_requested is not null
from jobs
where group_id = %(group_id)s
order by jobs.id;

-- name: find_idempotent
-- The job that has each of these keys, and whether it is the same job. One probe of the index each: the limit forbids any other way.
select given.place, first.id::text, first.same
from unnest(
    %(idempotency_key)s::text[], %(type)s::text[], %(priority)s::smallint[], %(payload)s::jsonb[], %(max_attempts)s::integer[]
) with ordinality as given(idempotency_key, type, priority, payload, max_attempts, place)
cross join lateral (
    select id, type = given.type and priority = given.priority and payload = given.payload
        and max_attempts is not distinct from given.max_attempts as same
    from jobs
    where idempotency_key = given.idempotency_key
    limit 1
) as first
order by given.place;

-- name: failures
select attempt, started_at, at, worker::text, type, message, traceback, fingerprint
from failures
where job_id = %(id)s
order by claim;

-- name: events
select at, kind, attempt, by, message from events where job_id = %(id)s order by at;

-- name: timeline
-- A page of what was written about a job and was not yet visible in the snapshot `seen`, in the order of (xact, number) from `xact` and
-- `number` on; with `upto`, only what was visible in that snapshot. The rows of the page stand beside the job as it is. One statement is one
-- snapshot.
select
    jobs.xmin::text, coalesce(%(upto)s::pg_snapshot, pg_current_snapshot())::text, jobs.status, jobs.claim, jobs.attempt,
    jobs.created_at, jobs.run_at, jobs.started_at, jobs.finished_at, jobs.worker::text,
    page.xact::text::bigint, page.number, page.at, page.kind, page.attempt, page.by, page.message,
    page.claim, page.started_at, page.worker, page.type, page.traceback
from jobs left join lateral (
    select
        xact, number, at, kind, attempt, by, message,
        null::bigint as claim, null::timestamptz as started_at, null as worker, null as type, null as traceback
    from events_between(
        jobs.id, %(seen)s::pg_snapshot, %(upto)s::pg_snapshot, %(xact)s::text::xid8, %(number)s::bigint, %(limit)s::integer
    )
    union all
    select xact, 0, at, 'failed', attempt, null, message, claim, started_at, worker::text, type, traceback
    from failures
    where job_id = jobs.id and (xact, 0) > (%(xact)s::text::xid8, %(number)s::bigint)
        and came_between(xact, %(seen)s::pg_snapshot, %(upto)s::pg_snapshot)
    order by xact, number
    limit %(limit)s
) as page on true
where jobs.id = %(id)s
order by page.xact, page.number;

-- name: stirred_jobs
-- Which of these jobs have changed since somebody saw them at this version, by this snapshot? Those that are gone have.
select distinct watched.id::text
from unnest(%(ids)s::uuid[], %(versions)s::text[], %(snapshots)s::text[]) as watched(id, version, snapshot)
left join jobs on jobs.id = watched.id
where jobs.id is null or jobs.xmin::text <> watched.version
    or exists (
        select from events
        where job_id = watched.id
            and xact >= pg_snapshot_xmin(watched.snapshot::pg_snapshot) and xact < pg_snapshot_xmax(pg_current_snapshot())
            and not pg_visible_in_snapshot(xact, watched.snapshot::pg_snapshot)
    );

-- name: cancel
-- A waiting job is cancelled at once, a running one is asked to stop; its worker is told through the channel.
-- Who was asked twice, to stop and to be removed, is removed.
with target as (
    select id, status from jobs where id = any(%(id)s::uuid[]) for update
), changed as (
    update jobs
    set status = case when jobs.status = 'PROCESSING' then jobs.status else 'CANCELLED' end::job_status,
        finished_at = case when jobs.status = 'PROCESSING' then null else clock_timestamp() end,
        stop_requested = case when jobs.status = 'PROCESSING' then greatest(jobs.stop_requested, %(stop)s::stop_request) else jobs.stop_requested end
    from target
    where jobs.id = target.id and target.status in ('SCHEDULED', 'PENDING', 'PROCESSING')
    returning jobs.id, jobs.status, jobs.attempt
), noted as (
    insert into events (job_id, kind, attempt, by)
    select id, case when status = 'CANCELLED' then 'cancelled' else 'stop requested' end, attempt, %(by)s from changed
)
select target.id::text, target.status, changed.id is not null, case when changed.status = 'PROCESSING' then pg_notify('jobsys', '') end
from target left join changed using (id);

-- name: requeue
-- The operator's retry: attempts start again at 0, history is kept (the end it had becomes an event), and the claim number goes on.
with target as (
    select id, status, attempt, finished_at from jobs where id = any(%(id)s::uuid[]) for update
), changed as (
    update jobs
    set status = 'PENDING', attempt = 0, crashes = 0, run_at = clock_timestamp(), started_at = null, finished_at = null,
        worker = null, result = null, progress = null, stop_requested = null, options = options - 'retries'
    from target
    where jobs.id = target.id and target.status in ('FAILED', 'DEAD', 'CANCELLED')
    returning jobs.id, jobs.queue, jobs.type, target.status as ended, target.attempt, target.finished_at
), counted as (
    insert into tally_log (queue, type, status, entered, departed)
    select queue, type, 'RETRIED', count(*), 0 from changed group by queue, type
), noted as (
    insert into events (job_id, at, kind, attempt, by, message)
    select id, finished_at, 'finished', attempt, null, ended from changed
    union all
    select id, clock_timestamp(), 'retried', null, %(by)s, null from changed
)
select target.id::text, target.status, changed.id is not null from target left join changed using (id);

-- name: bury_job
-- The operator's dead letter. The end a failed job had becomes an event.
with target as (
    select id, status, finished_at from jobs where id = any(%(id)s::uuid[]) for update
), changed as (
    update jobs
    set status = 'DEAD', finished_at = clock_timestamp()
    from target
    where jobs.id = target.id and target.status in ('FAILED', 'SCHEDULED', 'PENDING')
    returning jobs.id, jobs.attempt, target.status as ended, target.finished_at as ended_at, jobs.finished_at
), noted as (
    insert into events (job_id, at, kind, attempt, by, message)
    select id, ended_at, 'finished', attempt, null, ended from changed where ended_at is not null
    union all
    select id, finished_at, 'buried', attempt, %(by)s, null from changed
)
select target.id::text, target.status, changed.id is not null from target left join changed using (id);

-- name: now
select clock_timestamp();

-- name: matching
-- What a verb for many can be asked of, of one status: who was asked to stop already is not asked again, and what came to its status after
-- as_of isn't meant.
select id
from jobs
where status = '{status}' and {conditions} and coalesce(finished_at, created_at) <= %(as_of)s
    and (status <> 'PROCESSING' or stop_requested is null)

-- name: take
-- Which of these jobs match (still)? Those that nobody else has locked are locked now. Each is looked up by its id: of a status that many came
-- to just now PostgreSQL believes that there are few, and would read all of them each time (so the text), and join one with each.
with matching as (
    select id from jobs
    where id = any(%(id)s::uuid[]) and status::text = any(%(status)s)
        and coalesce(finished_at, created_at) <= %(as_of)s and (status <> 'PROCESSING' or stop_requested is null)
), free as (
    select id from jobs
    where id = any(%(id)s::uuid[]) and status::text = any(%(status)s)
        and coalesce(finished_at, created_at) <= %(as_of)s and (status <> 'PROCESSING' or stop_requested is null)
    for update skip locked
)
select id::text, id in (select id from free) from matching;

-- name: statuses
select id::text, status from jobs where id = any(%(id)s::uuid[]);

-- name: remove
delete from jobs where id = %(id)s and status <> 'PROCESSING' returning id::text;

-- name: pause_queue
insert into queues (name, paused) values (%(queue)s, true) on conflict (name) do update set paused = true;

-- name: resume_queue
update queues set paused = false where name = %(queue)s;

-- name: wake_queue
select pg_notify('jobsys', %(queue)s) where exists (select from workers where %(queue)s = any(asleep));

-- name: queue_settings
select name, paused, rate_count, extract(epoch from rate_period)::float8, max_running from queues;

-- name: oldest_due
-- The first of each priority is one probe of the ready index; the oldest of those is the oldest of all.
with recursive first as (
    (select priority, run_at from jobs where status = 'PENDING' and queue = %(queue)s order by priority, run_at limit 1)
    union all
    (
        select next.priority, next.run_at
        from first cross join lateral (
            select priority, run_at from jobs
            where status = 'PENDING' and queue = %(queue)s and jobs.priority > first.priority
            order by priority, run_at limit 1
        ) as next
    )
)
select min(run_at) from first having count(*) > 0;

-- name: waits
-- How long the oldest due job of each of these queues has been waiting, also when it is not PENDING yet because no worker is there to make it
-- so: of those a bounded number is looked at, the longest due first.
with first_of_queue as (
    select queue.name as queue, first.run_at
    from unnest(%(queues)s::text[]) as queue(name) cross join lateral (
        with recursive first as (
            (select priority, run_at from jobs where status = 'PENDING' and queue = queue.name order by priority, run_at limit 1)
            union all
            (
                select next.priority, next.run_at
                from first cross join lateral (
                    select priority, run_at from jobs
                    where status = 'PENDING' and queue = queue.name and jobs.priority > first.priority
                    order by priority, run_at limit 1
                ) as next
            )
        )
        select run_at from first
    ) as first
), overdue as (
    select queue, run_at from jobs where status = 'SCHEDULED' and run_at <= statement_timestamp() order by run_at limit 1000
)
select queue, date_part('epoch', clock_timestamp() - min(run_at))
from (select queue, run_at from first_of_queue union all select queue, run_at from overdue) as due
group by queue;

-- name: worker_strength
-- What each worker process could do, and whether its heart beats.
select heartbeat_at > clock_timestamp() - least(lost_after, heartbeat * 3), queues, threads, held_back from workers;

-- name: longest_transaction
-- Seconds since the oldest transaction began that keeps this database from removing dead rows (VACUUM itself does not).
select coalesce(max(date_part('epoch', clock_timestamp() - xact_start)), 0)
from pg_stat_activity
where datname = current_database()
    and pid <> pg_backend_pid()
    and coalesce(backend_xmin, backend_xid) is not null
    and not (state = 'active' and query ~* '^\s*(autovacuum:|vacuum\y)');

-- name: measurements
select metric, labels, buckets, sum from measurements order by metric, labels;

-- name: pools
-- Of the processes that are there, together.
select kind, name, sum(size)::integer, sum(in_use)::integer, sum(idle)::integer
from process_pools
where good_until > clock_timestamp()
group by kind, name
order by kind, name;

-- name: counts
-- Live numbers by queue, type and status, from the sums and what the log still holds.
select queue, type, status, sum(entered)::bigint, sum(departed)::bigint
from (
    select queue, type, status, entered, departed from tallies
    union all
    select queue, type, status, entered, departed from tally_log
    union all
    select queue, type, 'CREATED', created, 0 from tally_log where created > 0
) as moves
group by queue, type, status;

-- name: workers
select
    id::text, host, pid, version, queues, types, threads, started_at, heartbeat_at,
    heartbeat_at > clock_timestamp() - least(lost_after, heartbeat * 3),
    (select count(*) from jobs where jobs.status = 'PROCESSING' and jobs.worker = workers.id),
    held_back
from workers
order by started_at, id;

-- name: revocations
select kind, value, extract(epoch from at)::float8 from revocations;

-- name: revoke
-- The same again: of a subject, also what was issued meanwhile.
insert into revocations (kind, value) values (%(kind)s, %(value)s)
on conflict (kind, value) do update set at = excluded.at;

-- name: came_in_before
select exists (select from logins where key = %(key)s and right_at > clock_timestamp() - interval '30 days');

-- name: login_wait
-- Seconds until under each of these keys fewer than `limits` passwords were wrong within a minute; null: that is so.
select extract(epoch from max(wrong.at) + interval '1 minute' - clock_timestamp())::float8
from unnest(%(keys)s::text[], %(limits)s::integer[]) as asked(key, most)
join logins using (key)
cross join lateral (select at from unnest(wrong_at) as at order by at desc offset most - 1 limit 1) as wrong
where wrong.at > clock_timestamp() - interval '1 minute';

-- name: lock_logins
-- The keys come sorted, so that nobody waits for one that waits for him.
insert into logins (key) select unnest(%(keys)s::text[]) on conflict (key) do update set key = excluded.key;

-- name: count_login
-- Counted as wrong before it is looked at, or many at once would all be looked at.
update logins
set wrong_at = array(select at from unnest(wrong_at) as at where at > clock_timestamp() - interval '1 minute') || now.at
from (select clock_timestamp() as at offset 0) as now
where key = any(%(keys)s)
returning now.at;

-- name: login_succeeded
-- What was counted as wrong was right.
with given_back as (
    update logins set wrong_at = array_remove(wrong_at, %(counted_at)s)
    where key = any(array(select key from logins where key = any(%(keys)s) order by key for update))
)
insert into logins (key, right_at) values (%(key)s, clock_timestamp())
on conflict (key) do update set right_at = excluded.right_at;
