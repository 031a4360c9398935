-- jobsys keeps every job as one row of `jobs`, and that row is also the message its worker receives: there is no other broker.
--
-- A job is inserted PENDING (due) or SCHEDULED (due at run_at). A worker claims due jobs with `for update skip locked`: the row
-- becomes PROCESSING, names its worker, and its `claim` number goes up, for good. Whatever that worker writes later (finish,
-- retry, bury, release, cancel) names the id and the claim number and changes nothing unless both still fit: a worker that was taken for
-- dead can't overwrite the one that took over. `attempt` is the number people see: it is given back when a shutdown interrupts
-- a job, and starts again when an operator retries it; `claim` never goes down, and so it can be the fence.
--
-- A worker process keeps a row in `workers` and its heartbeat in it. When its database session is gone, or its heart silent
-- for too long, any other worker puts its jobs back (rescue). A job that was running at MAX_CRASHES such deaths is DEAD: the last of
-- them counts only when it ran alone.
--
-- Each failed attempt leaves a row in `failures`, written by the statement that ends the attempt: a job that succeeds pays
-- nothing for history. `events` holds what a job logs and what operators do. `queues` has a row for each queue that is paused or limited.
--
-- Counting never reads `jobs`: triggers append what each statement changed to `tally_log`, and reading sums it into `tallies`.
-- The same triggers tell workers of due jobs, with NOTIFY, only when one sleeps or is busy with less urgent ones, and few where a commit follows at
-- once: who is told and can't take a job, or leaves some, tells others. So a plain `insert into jobs` from any
-- client, inside any transaction, is counted, notified and run like every other job.
--
-- The statements that work on these tables are in queue.sql (the broker's) and jobs.sql (reads and the operator's verbs).
-- Once released, this file stays as it is: what changes the schema later is in migrations/, and migrations/README.md says how.

-- A UUID of version 7 (RFC 9562): milliseconds since 1970 in front, so that ids sort by time of creation.
create function new_job_id() returns uuid
language sql volatile parallel safe as $$
    select overlay(
        replace(gen_random_uuid()::text, '-', '')
        placing lpad(to_hex((extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
        from 1 for 13
    )::uuid
$$;

-- In the order of a job's life: what is up to PENDING waits, what is from COMPLETED on has ended.
create type job_status as enum ('SCHEDULED', 'PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'DEAD', 'CANCELLED');
create type stop_request as enum ('cancel', 'remove');

-- Every statement that writes reads the constraints anew: they are short on purpose (long ones made a single insert a tenth dearer).
create table jobs (
    id              uuid        primary key default new_job_id(),
    type            text        not null,
    queue           text        not null default null,                  -- left out: the type's, see fill_in_job
    priority        smallint    not null default null,                  -- lower first: high -10, default 0, low 10
    payload         jsonb       not null default '{}',
    options         jsonb       not null default '{}',                  -- Dramatiq's, for its middleware
    status          job_status  not null default 'PENDING',
    attempt         integer     not null default 0,                     -- how often it was started, as people count
    claim           bigint      not null default 0,                     -- a greater number at each claim: the fence
    crashes         integer     not null default 0,                     -- how often its worker died under it
    max_attempts    integer     default 0,                              -- null: without end
    run_at          timestamptz not null default clock_timestamp(),     -- not before
    created_at      timestamptz not null default clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    worker          uuid,                                               -- who has it, or had it last
    result          jsonb,
    error           jsonb,                                              -- of the last failed attempt: type, message, attempt, at
    progress        jsonb,
    stop_requested  stop_request,                                       -- while it runs; 'remove' when it has stopped
    group_id        uuid,
    idempotency_key text,
    constraint running_jobs_have_a_worker check
        (status <> 'PROCESSING' or (worker is not null and started_at is not null)),
    constraint waiting_jobs_have_no_worker check (status > 'PENDING' or worker is null),
    constraint ended_jobs_and_no_others_have_an_end check ((status >= 'COMPLETED') = (finished_at is not null)),
    constraint payload_is_an_object check (jsonb_typeof(payload) = 'object'),
    constraint options_are_an_object check (jsonb_typeof(options) = 'object'),
    constraint times_can_be_read_back check (least(run_at, created_at) >= '0001-01-02' and greatest(run_at, created_at) <= '9999-12-30'),
    constraint numbers_are_not_negative check (least(attempt, claim, crashes, max_attempts - 1) >= 0),
    -- A claim that overflows fails with all jobs it would have brought.
    constraint numbers_can_still_grow check (greatest(attempt, crashes) < 2000000000 and claim < 9000000000000000000)
)
-- Rows live short and change three times: vacuum early, in small steps.
with (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 1);

-- What is next in a queue?
create index jobs_ready on jobs (queue, priority, run_at, id) where status = 'PENDING';
-- What falls due next?
create index jobs_scheduled on jobs (run_at) where status = 'SCHEDULED';
-- What does this worker have?
create index jobs_running on jobs (worker) where status = 'PROCESSING';
-- What could be retried?
create index jobs_retriable on jobs (id) where status in ('FAILED', 'DEAD', 'CANCELLED');
-- What belongs together?
create index jobs_grouped on jobs (group_id, id) where group_id is not null;
-- Was this submitted before?
create unique index jobs_idempotent on jobs (idempotency_key) where idempotency_key is not null;
-- Who was asked to stop? (A worker asks once a second: not through jobs_running, whose dead entries pile up under an old snapshot.)
create index jobs_stopping on jobs (worker) where status = 'PROCESSING' and stop_requested is not null;
-- What is to be removed once it has stopped?
create index jobs_to_remove on jobs (id) where stop_requested = 'remove';

-- What workers say of the job types they know, for whoever inserts a job in SQL.
create table job_types (
    name         text     primary key,
    queue        text     not null,
    priority     smallint not null,
    max_attempts integer
);

create table failures (
    job_id      uuid        not null references jobs on delete cascade,
    claim       bigint      not null,
    attempt     integer     not null,
    started_at  timestamptz not null,
    at          timestamptz not null default clock_timestamp(),
    worker      uuid        not null,
    type        text        not null,       -- the exception's class
    message     text        not null,
    traceback   text        not null,
    fingerprint text        not null,       -- equal for failures of the same kind at the same place
    xact        xid8        not null default pg_current_xact_id(),     -- as in events
    primary key (job_id, claim)
);

create table events (
    job_id  uuid        not null references jobs on delete cascade,
    at      timestamptz not null default clock_timestamp(),
    kind    text        not null,           -- log, progress, retried, cancelled, buried, stop requested, released, worker lost
    attempt integer,
    by      text,                           -- who asked, where somebody did
    message text,
    -- Who reads on from a snapshot misses nothing that was committed late, and sees nothing twice: see `timeline` in jobs.sql.
    xact    xid8        not null default pg_current_xact_id(),
    number  bigint      not null generated by default as identity
);
create index events_of_a_job on events (job_id, xact, number);

create table workers (
    id            uuid        primary key,
    host          text        not null,
    pid           integer     not null,
    version       text        not null,
    queues        text[]      not null,
    types         text[]      not null,
    threads       integer     not null,
    started_at    timestamptz not null default clock_timestamp(),
    heartbeat_at  timestamptz not null default clock_timestamp(),
    heartbeat     interval    not null,     -- how often it means to beat
    lost_after    interval    not null,     -- how long its silence may last
    session_pid   integer     not null,     -- the backend it beats through,
    session_start timestamptz not null,     -- and since when, because pids are used again
    asleep        text[]      not null default '{}',  -- the queues it waits on for a notification
    busy_above    smallint,                           -- what it has in memory has this priority: it wants to hear of more urgent jobs
    occupied      boolean     not null default false, -- it has had no free thread for a while: others are told first
    held_back     text[]      not null default '{}',  -- the types it tries only now and then, because all their jobs fail alike
    suspect       uuid                                -- the job it runs alone, because that may be a killer
) with (fillfactor = 50);

create table queues (
    name          text        primary key,
    paused        boolean     not null default false,
    rate_count    integer,                  -- so many starts
    rate_period   interval,                 -- in this time, evenly spaced
    max_running   integer,
    next_start_at timestamptz not null default '-infinity',
    constraint a_rate_has_both_parts check ((rate_count is null) = (rate_period is null)),
    constraint limits_are_positive check (rate_count > 0 and rate_period > interval '0' and max_running > 0)
);

-- Bearer tokens that no longer count: the one with this jti, or all of this sub that were issued until `at`.
create table revocations (
    kind  text        not null,             -- jti or sub
    value text        not null,
    at    timestamptz not null default clock_timestamp(),
    primary key (kind, value)
);

-- Wrong passwords of the last minute, and from where users came in: passwords.py says what for. The keys are hashes, because people
-- also type passwords where the name belongs.
create table logins (
    key      text          primary key,
    wrong_at timestamptz[] not null default '{}',
    right_at timestamptz
);

-- How many jobs entered and left each status, by queue and type; CREATED and RETRIED are counted as if they were statuses, and so is
-- WORKERS_LOST, under the first of the worker's queues.
create table tallies (
    queue    text   not null,
    type     text   not null,
    status   text   not null,
    entered  bigint not null,
    departed bigint not null,
    primary key (queue, type, status)
) with (fillfactor = 50);
create table tally_log (
    like tallies,
    created  bigint not null default 0      -- how many of those that entered were new: the same as a row for CREATED
);

-- What web and worker processes measured, for /metrics: each adds what it counted since it last did, every few seconds. A bucket has what
-- exceeds the bound before it; the bounds are those of measurements.py, and what is beyond them is in the last.
create table measurements (
    metric  text             not null,
    labels  jsonb            not null,
    buckets bigint[]         not null,
    sum     double precision not null,
    primary key (metric, labels)
) with (fillfactor = 50);

-- How the connection pools of each process stand, as it said last; who has been silent for too long counts no more.
create table process_pools (
    process    uuid        not null,
    kind       text        not null,        -- web or worker
    name       text        not null,        -- as pg_stat_activity has it
    size       integer     not null,
    in_use     integer     not null,
    idle       integer     not null,
    good_until timestamptz not null,
    primary key (process, name)
) with (fillfactor = 50);

-- How many requests each client made in its window of the rate limit; jobsys/api/rate_limit.py says how it is kept. Unlogged: what is written here
-- is worth no wait for the disk. A crash of PostgreSQL empties it, and a window of every client begins anew.
create unlogged table rate_limits (
    client  text        primary key,
    ends_at timestamptz not null,           -- the window's end; the next one begins with the next request
    used    bigint      not null            -- may go beyond the limit: those requests were refused
) with (fillfactor = 50);

create table schema_versions (
    version    integer     primary key,
    name       text        not null,
    sha256     text        not null,        -- of the file: what was applied stays as it is
    applied_at timestamptz not null default clock_timestamp()
);

-- A plain `insert into jobs (type, payload)` gets what its type declares, once a worker has said so; and a run_at to come makes it SCHEDULED.
create function fill_in_job() returns trigger
language plpgsql set search_path from current as $$
declare
    declared record;
begin
    select queue, priority, max_attempts into declared from job_types where name = new.type;
    new.queue := coalesce(new.queue, declared.queue, 'default');
    new.priority := coalesce(new.priority, declared.priority, 0);
    if new.max_attempts = 0 then
        new.max_attempts := case when declared.queue is null then 4 else declared.max_attempts end;
    end if;
    if new.status = 'PENDING' and new.run_at > clock_timestamp() then
        new.status := 'SCHEDULED';
    end if;
    return new;
end $$;

create function after_jobs_written() returns trigger
language plpgsql set search_path from current as $$
begin
    -- One row is counted without grouping, which spares a statement that writes one a tenth of its cost.
    if tg_op = 'INSERT' then
        insert into tally_log (queue, type, status, entered, departed, created)
        select queue, type, status, 1, 0, 1 from written where not exists (select from written offset 1);
        if not found then
            insert into tally_log (queue, type, status, entered, departed, created)
            select queue, type, status, count(*), 0, count(*) from written group by queue, type, status;
        end if;
    else
        insert into tally_log (queue, type, status, entered, departed)
        select move.*
        from written, previous, lateral (
            values (written.queue, written.type, written.status, 1, 0), (previous.queue, previous.type, previous.status, 0, 1)
        ) as move
        where not exists (select from written offset 1)
            and (written.queue, written.type, written.status) <> (previous.queue, previous.type, previous.status);
        if not found then
            -- Net: a row that stays in its status has neither entered nor left it. (No statement moves rows both into and out of one status.)
            insert into tally_log (queue, type, status, entered, departed)
            select queue, type, status, greatest(sum(n), 0), greatest(-sum(n), 0)
            from (
                select queue, type, status, 1 as n from written
                union all
                select queue, type, status, -1 from previous
            ) as moves
            group by queue, type, status
            having sum(n) <> 0;
        end if;
    end if;
    -- Tell of due jobs who waits for them: who sleeps, or else who is busy with less urgent ones. Where the commit follows at once, four of them, and
    -- those that may take a job at once before others: when all were told, 32 idle processes needed 28 ms of CPU for one, most of it to find it gone.
    -- Where it may be long in coming, all: who is idle then is not known now. And of a queue with limits all, because each has to know of those.
    if exists (select from written where status = 'PENDING')
        and exists (select from workers where asleep <> '{}' or busy_above is not null)
    then
        perform pg_notify('jobsys ' || told.id, due.queue)
        from (select queue, type, min(priority) as priority from written where status = 'PENDING' group by queue, type) as due
        cross join lateral (
            select id
            from workers
            where heartbeat_at > '-infinity'
                and (due.queue = any(asleep) or due.priority < busy_above and due.queue = any(queues))
            order by due.type = any(types) and due.type <> all(held_back) desc,
                occupied or heartbeat_at < clock_timestamp() - heartbeat * 1.5,
                due.queue = any(asleep) desc,
                random()
            limit case
                when statement_timestamp() = transaction_timestamp()
                    and not exists (select from queues where name = due.queue and (rate_count is not null or max_running is not null))
                then 4
            end
        ) as told;
    end if;
    return null;
end $$;

create function after_jobs_delete() returns trigger
language plpgsql set search_path from current as $$
begin
    insert into tally_log (queue, type, status, entered, departed)
    select queue, type, status, 0, count(*) from removed group by queue, type, status;
    return null;
end $$;

create trigger jobs_filled_in before insert on jobs
    for each row
    when (
        new.queue is null or new.priority is null or new.max_attempts = 0
        or new.status = 'PENDING' and new.run_at > clock_timestamp()
    )
    execute function fill_in_job();
create trigger jobs_inserted after insert on jobs
    referencing new table as written for each statement execute function after_jobs_written();
create trigger jobs_updated after update on jobs
    referencing old table as previous new table as written for each statement execute function after_jobs_written();
create trigger jobs_deleted after delete on jobs
    referencing old table as removed for each statement execute function after_jobs_delete();

-- What clients and workers run all the time is in functions, because PostgreSQL plans these once per connection, with or without a pooler in
-- between: reading and planning a claim of one job each time costs about as much as running it. The one plan serves whatever comes, though it
-- may have been made when the table was empty. So to what searches in tables the ways that are good for small ones only are closed. (That
-- holds for the triggers' plans, too, while they fire in here; before PostgreSQL 18 a closed way that is taken all the same looks so dear that
-- it would be compiled each time: no jit.)

-- One job that is due now. What is left out has defaults. It answers with one text: id, status, and run_at and created_at in µs since 1970;
-- a row would be materialized, and planned as a table is, which makes a submission some 15 µs dearer. Null: a trigger has kept no row of it.
create function submit_job(
    id uuid, type text, queue text, priority smallint, payload jsonb, options jsonb, max_attempts integer, group_id uuid
) returns text
language plpgsql as $$
#variable_conflict use_column
declare
    answer text;
begin
    insert into jobs (id, type, queue, priority, payload, options, max_attempts, group_id)
    values (id, type, queue, priority, payload, options, max_attempts, group_id)
    returning concat_ws(
        ' ', jobs.id, status, (extract(epoch from run_at) * 1000000)::bigint, (extract(epoch from created_at) * 1000000)::bigint
    ) into answer;
    return answer;
end $$;

-- Large claims of a queue take turns. With `for update skip locked` alone they disturb each other: who claims while others do looks up in the
-- lock manager each row that these have locked; and where another has just claimed a row that this one still sees PENDING, it locks the
-- version in which that one runs. Its outcome then waits for this claim, and so do other claims (following a row's versions, PostgreSQL waits for
-- locks whatever `skip locked` says). With 32 processes on two cores that took half of the throughput.
--
-- Whether it is this transaction's turn, which then lasts until it ends: at once, or within a moment for whoever may wait. So few wait at a
-- time (see claims.py), and none for long.
create function take_turn(queue text, may_wait boolean) returns boolean
language plpgsql set lock_timeout = '90ms' as $$
begin
    if not may_wait then
        return pg_try_advisory_xact_lock('jobs'::regclass::oid::integer, hashtext(queue));
    end if;
    perform pg_advisory_xact_lock('jobs'::regclass::oid::integer, hashtext(queue));
    return true;
exception when lock_not_available then
    return false;
end $$;

-- Tell some other workers that sleep on this queue, and have a free thread, of jobs that this one can't take.
create function tell_others(queue text, worker_id uuid, most integer) returns void
language plpgsql as $$
begin
    perform pg_notify('jobsys ' || told.id, queue)
    from (
        select workers.id
        from workers
        where queue = any(asleep) and workers.id <> worker_id and not occupied and heartbeat_at > '-infinity'
        order by random()
        limit most
    ) as told;
end $$;

-- Due jobs, in the order of the places to look: queue by queue and priority by priority, from the most urgent on; first come first served
-- within one. Only types this worker knows; nothing of a queue that is paused or limited, and nothing when this worker has been declared
-- lost, or reported dead while it waited for its turn. A place begins where the last claim ended (see claims.py), because dead index entries
-- before it may be many while an old snapshot is held. With `turn` a claim of one queue is made only when it is its turn, for which it may
-- `wait` or only `try`; a row of nulls says that it was not. With `ahead_of` jobs that are more urgent than this come alone, if there are
-- any: a large claim takes as long as all its jobs do, and they need not wait for the others. Which jobs comes first, by itself, so that the
-- update goes by the primary key, and is spared when there are none.
--
-- A claim is not waited for until it is on disk, and the job starts the sooner: whatever is committed later (its outcome, any submission)
-- takes it there, and PostgreSQL by itself within three times its wal_writer_delay, 0.6 s. Should PostgreSQL crash before, the job is
-- PENDING again, and runs once more. The step of the claim number is random, so that the claim which was forgotten and the next one differ,
-- and only the next one's outcome counts.
--
-- It waits for no lock longer than its lock_timeout (claims.py then looks afresh). For it may have to, although it skips what is locked: where a
-- row it found was claimed just now, and that claim is committed before it looks who has the row, it follows the row to its next version, and
-- waits for whoever is writing the outcome.
--
-- It names its columns: a `setof jobs` that waits while a migration adds a column to `jobs` fails, having promised the row as it was. They come as the
-- worker reads them, so that nothing is left to the statement that calls this, which is read and planned each time.
create function claim_jobs(
    worker_id uuid, known_types text[], queue_names text[], priorities smallint[], from_run_at timestamptz[], from_id uuid[], most integer,
    turn text, ahead_of smallint
) returns table (
    id text, type text, priority smallint, payload text, options text, attempt integer, claim bigint, max_attempts integer, run_at text,
    age bigint, crashes integer, queue text, late float8
)
language plpgsql
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set enable_hashjoin = off
set enable_mergejoin = off set jit = off set lock_timeout = '90ms' as $$
#variable_conflict use_column
declare
    found_ids uuid[];
    least_urgent integer;
begin
    if turn is not null and not take_turn(queue_names[1], turn = 'wait') then
        return next;
        return;
    end if;
    foreach least_urgent in array case when ahead_of is null then array[32767] else array[ahead_of - 1, 32767] end loop
        found_ids := array(  -- in a statement of its own, which sees what was claimed before its turn
            select next.id
            from unnest(queue_names, priorities, from_run_at, from_id) as place(queue, priority, run_at, id)
            cross join lateral (
                select jobs.id
                from jobs
                where jobs.status = 'PENDING'
                    and jobs.queue = place.queue
                    and jobs.priority = place.priority
                    and (jobs.run_at, jobs.id) > (place.run_at, place.id)
                    and jobs.type = any(known_types)
                order by jobs.run_at, jobs.id
                limit most
                for update skip locked
            ) as next
            where place.priority <= least_urgent
                and exists (select from workers where workers.id = worker_id and heartbeat_at > '-infinity')
                and not exists (select from queues where name = place.queue and (paused or rate_count is not null or max_running is not null))
            limit most
        );
        exit when found_ids <> '{}';
    end loop;
    if found_ids = '{}' then
        return;
    end if;
    if cardinality(found_ids) = most then
        -- There may be more than this worker takes: the more it took, the more others are told.
        perform tell_others(queue_names[1], worker_id, 4 * most);
    end if;
    set local synchronous_commit = off;
    return query
    update jobs
    set status = 'PROCESSING', attempt = attempt + 1, claim = claim + 1 + (random() * 2147483647)::bigint, started_at = clock_timestamp(),
        worker = worker_id, progress = null
    where id = any(found_ids)
    returning id::text, type, priority, payload::text, options::text, attempt, claim, max_attempts, (run_at at time zone 'UTC')::text,
        (date_part('epoch', clock_timestamp() - created_at) * 1000)::bigint, crashes, queue, date_part('epoch', clock_timestamp() - run_at);
end $$;

-- Jobs whose attempt succeeded are COMPLETED. `any(array[…])` and `status::text` leave the planner the primary key as the only way from a
-- claim to its row: it can neither join by hashing or sorting all jobs, nor walk through all that run (and, under an old snapshot, ran).
create function finish_jobs(ids uuid[], claims bigint[], results jsonb[]) returns setof uuid
language plpgsql
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set jit = off set lock_timeout = '100ms' as $$
#variable_conflict use_column
begin
    return query
    update jobs
    set status = 'COMPLETED', finished_at = clock_timestamp(), result = done.result
    from unnest(ids, claims, results) as done(id, claim, result)
    where jobs.id = any(array[done.id]) and jobs.claim = done.claim and jobs.status::text = 'PROCESSING'
    returning jobs.id;
end $$;

-- Was what a transaction wrote not yet visible in the snapshot `seen`, and visible in `upto`? Null is the snapshot before all others, and that of now.
-- (What was restored from another server may name transactions that are yet to come here: that has always been there.)
create function came_between(xact xid8, seen pg_snapshot, upto pg_snapshot) returns boolean
language sql stable as $$
    select (seen is null or not pg_visible_in_snapshot(xact, seen))
        and (upto is null or pg_visible_in_snapshot(xact, upto) or seen is null and xact >= pg_snapshot_xmax(pg_current_snapshot()))
$$;

-- The events of a job that came between two snapshots, in the order of (xact, number) from these on; so many at most, however many it has.
create function events_between(job uuid, seen pg_snapshot, upto pg_snapshot, after_xact xid8, after_number bigint, most integer)
returns setof events
language plpgsql stable
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
set search_path from current as $$
begin
    return query
    select *
    from events
    where job_id = job and (xact, number) > (after_xact, after_number)
        and xact >= coalesce(pg_snapshot_xmin(seen), '0') and came_between(xact, seen, upto)
    order by xact, number
    limit most;
end $$;

-- Count what clients asked for, each in a window that lasts for `period` from its first request on; how many it has by now, and the seconds
-- the window has left. Waits briefly for a lock, and not for the disk. Clients are taken in order, so that two calls can't wait for each other.
create function count_requests(clients text[], numbers bigint[], period interval)
returns table (client text, used bigint, seconds_left float8)
language plpgsql
set lock_timeout = '300ms' as $$
#variable_conflict use_column
begin
    return query
    insert into rate_limits as known (client, ends_at, used)
    select came.client, clock_timestamp() + period, came.number
    from unnest(clients, numbers) as came(client, number)
    order by came.client
    on conflict (client) do update set
        used = excluded.used + case when known.ends_at + period > excluded.ends_at then known.used else 0 end,
        -- No window is longer than the period, even if the limit or the server's clock was changed.
        ends_at = case when known.ends_at + period > excluded.ends_at then least(known.ends_at, excluded.ends_at) else excluded.ends_at end
    returning known.client, known.used, extract(epoch from known.ends_at - clock_timestamp())::float8;
end $$;
