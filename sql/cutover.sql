-- 05: the swap. All of it in one transaction that holds ACCESS EXCLUSIVE on the tables named in its LOCK.

-- name: drop_key
ALTER TABLE {table} DROP CONSTRAINT {constraint}

-- name: refuse_written
-- Under the locks of the script, which replays nothing: what is in a log would be in no copy, and the way back would take it.
DO $written$ BEGIN
  IF EXISTS (SELECT FROM {log}) THEN
    RAISE EXCEPTION USING MESSAGE = {said};
  END IF;
END $written$

-- name: refuse_moves
-- PostgreSQL 14 moves a row to another partition by a delete, and ON DELETE CASCADE would take what references it along.
CREATE FUNCTION {keep_function}() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RAISE feature_not_supported USING MESSAGE = format('%I of %I cannot change on PostgreSQL 14: rows that reference it would be deleted',
    TG_ARGV[0], TG_ARGV[1]), HINT = 'Upgrade to PostgreSQL 15, then drop this trigger.';
END $$;
CREATE TRIGGER runbook_keep_partition BEFORE UPDATE ON {source} FOR EACH ROW WHEN (OLD.{key} IS DISTINCT FROM NEW.{key})
  EXECUTE FUNCTION {keep_function}({key_text}, {name_text})

-- name: allow_moves
DROP FUNCTION {keep_function}()

-- name: rename_index
ALTER INDEX {index} RENAME TO {to}

-- name: rename_sequence
ALTER SEQUENCE {sequence} RENAME TO {to}

-- name: set_schema
ALTER TABLE {table} SET SCHEMA {to}

-- name: drop_unplaced
-- Empty, as was checked under this lock.
DROP TABLE {unplaced}

-- name: sequence_position
-- Identity sequences are two: one goes on where the other stands, or the first insert would be a duplicate key. Whoever asked the
-- other for a number by its name, and waits for our lock, still gets one of its: as many are left out as there can be sessions.
SELECT setval({to}, CASE WHEN ahead.position BETWEEN q.seqmin AND q.seqmax THEN ahead.position::bigint ELSE s.last_value END, s.is_called)
  FROM {sequence} s JOIN pg_sequence q ON q.seqrelid = {sequence_text}::regclass
 CROSS JOIN LATERAL (SELECT s.last_value + current_setting('max_connections')::numeric * q.seqincrement * q.seqcache AS position) ahead

-- name: sequence_position_back
-- Unless nobody has taken a number since the swap: then the original's is where it was. setval would outlive an attempt that fails,
-- and where it put the original be taken for that; after RESTART it goes with the attempt.
DO $position$ BEGIN
  IF (SELECT s.last_value <> o.last_value + current_setting('max_connections')::numeric * q.seqincrement * q.seqcache OR s.is_called <> o.is_called
        FROM {sequence} s JOIN pg_sequence q ON q.seqrelid = {sequence_text}::regclass CROSS JOIN {original} o) THEN
    ALTER SEQUENCE {original} RESTART;
    PERFORM setval({to}, last_value, is_called) FROM {sequence};
  END IF;
END $position$

-- name: unplaced_rows
SELECT count(*) FROM {unplaced}

-- name: validated
SELECT k.conname AS key, k.conrelid::regclass::text AS table, (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = k.conrelid) AS schema, (SELECT relname FROM pg_class WHERE oid = k.conrelid) AS name, k.convalidated AS validated, pg_get_constraintdef(k.oid) AS definition
  FROM pg_constraint k WHERE k.contype = 'f' AND k.conparentid = 0 AND (k.confrelid = {table_text}::regclass OR k.conrelid = {table_text}::regclass)
 ORDER BY 2, 1
