-- What the copy looks at before each range.

-- name: replica_lag
SELECT max(extract(epoch FROM replay_lag))::float8 FROM pg_stat_replication

-- name: active_sessions
SELECT count(*) FROM pg_stat_activity
 WHERE state = 'active' AND backend_type = 'client backend' AND datname = current_database() AND application_name NOT LIKE {me}
