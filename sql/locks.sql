-- Waiting for others: who they are, and for how long.

-- name: blockers
-- Who stands before this backend in the queue of a lock. A prepared transaction blocks as pid 0.
SELECT b.pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, '') AS state,
       coalesce(left(a.query, 80), '') AS query,
       CASE WHEN b.pid = 0 THEN (SELECT string_agg(gid, ', ') FROM pg_prepared_xacts WHERE database = current_database()) END AS gid
  FROM unnest(pg_blocking_pids({pid})) b(pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid

-- name: holders
-- Who holds or awaits a lock on one of these tables, when nobody could be asked while we waited.
SELECT coalesce(l.pid, 0) AS pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, '') AS state,
       coalesce(left(a.query, 80), '') AS query,
       CASE WHEN l.pid IS NULL THEN (SELECT string_agg(gid, ', ') FROM pg_prepared_xacts WHERE database = current_database()) END AS gid
  FROM (SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'relation' AND relation = ANY ({oids}::oid[]) AND granted) l
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.pid IS DISTINCT FROM pg_backend_pid()

-- name: old_snapshots
-- Sessions whose snapshot is older than transaction {horizon}: to them the shadow is empty. Their own age tells;
-- a snapshot taken after the horizon has an xmin above it.
SELECT a.pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, '') AS state,
       coalesce(left(a.query, 80), '') AS query, NULL AS gid
  FROM pg_stat_activity a
 WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type = 'client backend'
   AND a.backend_xmin IS NOT NULL AND age(a.backend_xmin) >= age({horizon}::text::xid) AND a.application_name NOT LIKE 'runbook%'

-- name: horizon
-- The id of this transaction; snapshots that do not see it are older.
SELECT pg_current_xact_id()::xid

-- name: wraparound
SELECT p.pid FROM pg_stat_progress_vacuum p JOIN pg_stat_activity a USING (pid)
 WHERE p.relid = {oid} AND a.query LIKE '%to prevent wraparound%'

-- name: deadlock_timeout
SELECT setting::int FROM pg_settings WHERE name = 'deadlock_timeout'

-- name: lock
LOCK TABLE {tables} IN {mode} MODE
