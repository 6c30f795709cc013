-- 05: the swap. All of it in one transaction that holds ACCESS EXCLUSIVE on the tables named in its LOCK.

-- name: evict
-- First a lock that no reader or writer waits for: autovacuum yields to a waiter after deadlock_timeout.
LOCK TABLE {tables} IN SHARE UPDATE EXCLUSIVE MODE

-- name: lock
-- Each table's strongest lock at once: a weaker one first would be a deadlock with a session that read and then writes.
LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE

-- name: drop_key
ALTER TABLE {table} DROP CONSTRAINT {constraint}

-- name: rename_index
ALTER INDEX {index} RENAME TO {to}

-- name: rename_table
ALTER TABLE {table} RENAME TO {to}

-- name: rename_sequence
ALTER SEQUENCE {sequence} RENAME TO {to}

-- name: set_schema
ALTER TABLE {table} SET SCHEMA {to}

-- name: drop_unplaced
-- Empty, as was checked under this lock.
DROP TABLE {unplaced}

-- name: own_sequence
ALTER SEQUENCE {sequence} OWNED BY {table}.{column}

-- name: sequence_position
-- Identity sequences are two: one goes on where the other stands, or the first insert would be a duplicate key.
SELECT setval({to}, s.last_value, s.is_called) FROM {sequence} s

-- name: add_constraint
ALTER TABLE {table} ADD CONSTRAINT {constraint} {definition}

-- name: validate
ALTER TABLE {table} VALIDATE CONSTRAINT {constraint}

-- name: replica_full
ALTER TABLE {table} REPLICA IDENTITY {identity}

-- name: unplaced_rows
SELECT count(*) FROM {unplaced}

-- name: validated
SELECT k.conname AS key, k.conrelid::regclass::text AS table, k.convalidated AS validated, pg_get_constraintdef(k.oid) AS definition
  FROM pg_constraint k WHERE k.contype = 'f' AND k.conparentid = 0 AND (k.confrelid = {table_text}::regclass OR k.conrelid = {table_text}::regclass)
 ORDER BY 2, 1

-- name: longest_wait
-- How long the sessions that wait for a lock have been waiting: what the application feels of an attempt.
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0)::float8 AS seconds
  FROM pg_locks l WHERE NOT l.granted AND l.relation = ANY ({oids}::oid[]) AND l.pid <> {pid}
