-- What `jobsys doctor` asks, beside some statements of queue.sql and jobs.sql. Each stands alone, writes nothing, and costs about the same
-- whether there are ten jobs or ten million: it goes by an index, or looks at a bounded number of rows.

-- name: server
select
    current_setting('server_version'), current_setting('server_version_num')::integer, current_database()::text, current_user::text,
    pg_is_in_recovery(), current_setting('search_path');

-- name: settings_in_force
-- As they are for this role in this database, and where that comes from.
select name, setting, source from pg_settings where name = any(%(names)s::text[]);

-- name: schemas_of_jobsys
select namespace.nspname::text
from pg_class as versions join pg_namespace as namespace on namespace.oid = versions.relnamespace
where versions.relname = 'schema_versions'
    and exists (select from pg_class as jobs where jobs.relname = 'jobs' and jobs.relnamespace = namespace.oid);

-- name: migrated
select to_regclass('schema_versions') is not null;

-- name: versions_applied
select version, name from schema_versions order by version;

-- name: faulty_objects
-- Which of the expected objects are not there, or are there and of no use? A trigger is looked for on its table.
select kind, name, fault
from (
    select
        expected.kind, expected.name,
        case
            when case expected.kind
                when 'trigger' then trigger.oid is null
                when 'function' then not exists (select from pg_proc where proname = expected.name and pg_function_is_visible(oid))
                when 'type' then to_regtype(expected.name) is null
                else to_regclass(expected.name) is null
            end then 'missing'
            when trigger.tgenabled in ('D', 'R') then 'disabled'
            when not (index.indisvalid and index.indisready) then 'invalid'
        end as fault
    from unnest(%(kinds)s::text[], %(names)s::text[], %(tables)s::text[]) as expected(kind, name, home)
    left join pg_trigger as trigger
        on expected.kind = 'trigger' and trigger.tgname = expected.name and trigger.tgrelid = to_regclass(expected.home)
    left join pg_index as index on expected.kind = 'index' and index.indexrelid = to_regclass(expected.name)
) as found
where fault is not null;

-- name: connections
-- Of the server, this database and this role: how many connections are used, and how many may be (-1: without limit).
select
    count(*),
    current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
        - coalesce(current_setting('reserved_connections', true)::integer, 0),
    count(*) filter (where datname = current_database()),
    (select datconnlimit from pg_database where datname = current_database()),
    count(*) filter (where usename = current_user),
    (select rolconnlimit from pg_roles where rolname = current_user)
from pg_stat_activity
where usesysid is not null and coalesce(backend_type, 'client backend') = 'client backend';

-- name: clock
select extract(epoch from clock_timestamp())::float8;

-- name: backend
select pg_backend_pid();

-- name: open_transactions
-- The sessions of this database in a transaction, and how many transactions were begun since the oldest that each wants to look back to
-- (null: to none), longest first. What VACUUM sees is in nobody's way.
select
    pid, application_name, usename::text, host(client_addr), state, left(query, 1000),
    extract(epoch from clock_timestamp() - xact_start)::float8,
    extract(epoch from clock_timestamp() - state_change)::float8,
    greatest(age(backend_xmin), age(backend_xid))
from pg_stat_activity
where datname = current_database()
    and backend_type in ('client backend', 'background worker')
    and pid <> pg_backend_pid()
    and xact_start is not null
    and not (state = 'active' and query ~* '^\s*vacuum\y')
order by xact_start
limit 100;

-- name: hidden_sessions
-- Those of other roles, whose doings this role may not see.
select count(*) from pg_stat_activity where datname = current_database() and query = '<insufficient privilege>';

-- name: prepared_transactions
select gid, owner::text, extract(epoch from clock_timestamp() - prepared)::float8, age(transaction)
from pg_prepared_xacts
where database = current_database()
order by prepared;

-- name: replication
-- Slots and standbys that keep dead rows, with how many transactions were begun since.
select 'replication slot', slot_name::text, active, age(xmin) from pg_replication_slots where xmin is not null
union all
select 'standby', application_name, true, age(backend_xmin) from pg_stat_replication where backend_xmin is not null;

-- name: dead_rows
select
    pg_class.relname::text, n_live_tup, n_dead_tup,
    extract(epoch from clock_timestamp() - greatest(last_vacuum, last_autovacuum))::float8,
    exists (select from pg_options_to_table(reloptions) where option_name = 'autovacuum_enabled' and not option_value::boolean)
from pg_stat_user_tables join pg_class on pg_class.oid = relid
where relid = any(array(select to_regclass(name)::oid from unnest(%(tables)s::text[]) as name))
order by n_dead_tup desc;

-- name: wraparound
-- The database of this server that is nearest to running out of transaction numbers, or of multixacts.
select datname::text, greatest(age(datfrozenxid), mxid_age(datminmxid)) from pg_database order by 2 desc limit 1;

-- name: heartbeats
-- Every worker, how long it has been silent (null: its supervisor saw it die), and whether it counts as alive.
select
    id::text, host, pid, version, queues, types, threads,
    case when heartbeat_at > '-infinity' then extract(epoch from clock_timestamp() - heartbeat_at) end::float8,
    extract(epoch from lost_after)::float8,
    heartbeat_at > clock_timestamp() - least(lost_after, heartbeat * 3),
    (select count(*) from jobs where jobs.status = 'PROCESSING' and jobs.worker = workers.id),
    held_back
from workers
order by started_at, id;

-- name: due
-- The queues that have due jobs, and for how many seconds the oldest has waited: one probe of the ready index for each queue and priority.
with recursive first as (
    (select queue, priority, run_at from jobs where status = 'PENDING' order by queue, priority, run_at limit 1)
    union all
    (
        select next.queue, next.priority, next.run_at
        from first cross join lateral (
            select queue, priority, run_at from jobs
            where status = 'PENDING' and (jobs.queue, jobs.priority) > (first.queue, first.priority)
            order by queue, priority, run_at limit 1
        ) as next
    )
)
select queue, extract(epoch from clock_timestamp() - min(run_at))::float8 from first group by queue order by queue;

-- name: oldest_of_type
-- For how many seconds the oldest due job of this type has waited, if there is one among the first thousand of its queue.
select extract(epoch from clock_timestamp() - min(run_at))::float8
from (
    select type, run_at from jobs where status = 'PENDING' and queue = %(queue)s order by priority, run_at, id limit 1000
) as first
where type = %(type)s;

-- name: abandoned
-- Jobs that run at workers which have no row, by worker, and for how many seconds they have.
select worker::text, count(*), extract(epoch from clock_timestamp() - min(started_at))::float8
from jobs
where status = 'PROCESSING' and not exists (select from workers where workers.id = jobs.worker)
group by worker
order by 2 desc;

-- name: unpruned
-- Of the hundred first jobs, those that should have been pruned a day ago: their number, and how many seconds ago the oldest ended.
select count(*), extract(epoch from clock_timestamp() - min(finished_at))::float8
from (select finished_at from jobs order by id limit 100) as first
where finished_at < clock_timestamp() - (%(days)s + 1) * interval '1 day';

-- name: unprunable
-- Old jobs whose ids lie beyond those of tomorrow, where pruning does not look: they are not of version 7. At most ten thousand.
select count(*), min(id::text)
from (
    select id, finished_at from jobs
    where id > overlay(
        '00000000-0000-7000-8000-000000000000' placing regexp_replace(
            lpad(to_hex((extract(epoch from statement_timestamp() + interval '1 day') * 1000)::bigint), 12, '0'), '(.{8})(.{4})', '\1-\2'
        ) from 1 for 13
    )::uuid
    order by id
    limit 10000
) as beyond
where finished_at < clock_timestamp() - %(days)s * interval '1 day';

-- name: unsummed
-- How many rows the log of counts holds, up to `most`.
select count(*) from (select from tally_log limit %(most)s) as log;
