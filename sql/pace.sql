-- What is looked at before a piece of work.

-- name: alone
-- Others than us who are at work, or were a second ago; whoever hides it is taken to be.
SELECT NOT EXISTS (
  SELECT FROM pg_stat_activity
   WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND coalesce(application_name, '') NOT LIKE 'runbook %'
     AND (state IS NULL OR state = 'active' OR state_change > clock_timestamp() - interval '1 second')) AS alone

-- name: free_sessions
-- Connections that are left to roles that are no superusers.
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(current_setting('reserved_connections', true)::int, 0) - sum(numbackends)::int AS free FROM pg_stat_database

-- name: settle
-- The server's process; and where others are at work, no more than this one. Of a role that works as a replica's keys and triggers would be
-- passed over; only who may set that is to.
SELECT pg_backend_pid() AS pid, CASE WHEN NOT alone THEN set_config('max_parallel_workers_per_gather', '0', false) END,
       CASE WHEN NOT alone THEN set_config('max_parallel_maintenance_workers', '0', false) END,
       CASE WHEN current_setting('session_replication_role') <> 'origin' THEN set_config('session_replication_role', 'origin', false) END FROM ({alone}) others

-- name: replica_lag
SELECT max(extract(epoch FROM replay_lag))::float8 FROM pg_stat_replication

-- name: active_sessions
SELECT count(*) FROM pg_stat_activity
 WHERE state = 'active' AND backend_type = 'client backend' AND datname = current_database() AND application_name NOT LIKE {me}
