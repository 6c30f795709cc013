-- The change log: which rows changed, by primary key, and replaying them from their present state.

-- name: create
-- An ordinary, logged table: an unlogged one would be emptied by a crash. No identity and no sequence, which would
-- change the application's lastval(). REPLICA IDENTITY FULL, or deletes fail where a publication covers the schema. No
-- autovacuum: to shorten its file it waits for the writers for five seconds, and as long the replays' own VACUUM cannot run.
GRANT USAGE, CREATE ON SCHEMA {staging} TO {owner};
CREATE TABLE {log} WITH (autovacuum_enabled = off) AS SELECT {log_columns} FROM {source} WHERE false;
CREATE TABLE {back} WITH (autovacuum_enabled = off) AS SELECT {log_columns} FROM {source} WHERE false;
ALTER TABLE {log} REPLICA IDENTITY FULL;
ALTER TABLE {back} REPLICA IDENTITY FULL;

-- name: create_functions
-- SECURITY DEFINER: the application's role has no rights on the log. search_path pinned: nobody can slip in a table.
CREATE FUNCTION {log_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_OP = 'INSERT' THEN
    INSERT INTO {log} SELECT {n_pk} FROM added n;
  ELSIF TG_OP = 'UPDATE' THEN
    INSERT INTO {log} SELECT {old_pk} FROM removed o UNION SELECT {n_pk} FROM added n;
  ELSE
    INSERT INTO {log} SELECT {old_pk} FROM removed o;
  END IF;
  RETURN NULL;
END $$;
CREATE FUNCTION {back_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO {back} VALUES ({row_old});
  END IF;
  IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND ROW({row_old})::record *<> ROW({row_new})::record THEN
    INSERT INTO {back} VALUES ({row_new});
  END IF;
  RETURN NULL;
END $$;
-- TRUNCATE has no rows: a marker of NULLs stands for all of them. ROW(...) IS NULL looks at them, and not at what is in a composite one.
CREATE FUNCTION {truncate_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_ARGV[0] = 'back' THEN
    INSERT INTO {back} VALUES ({marker});
  ELSE
    INSERT INTO {log} VALUES ({marker});
  END IF;
  RETURN NULL;
END $$;

-- name: switch_on
-- SHARE ROW EXCLUSIVE on the source: writers wait, readers do not. Statement triggers with transition tables: one insert
-- a statement. ALWAYS: a session in replica mode is logged, too.
CREATE TRIGGER runbook_log_insert AFTER INSERT ON {source} REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION {log_function}();
CREATE TRIGGER runbook_log_update AFTER UPDATE ON {source} REFERENCING OLD TABLE AS removed NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION {log_function}();
CREATE TRIGGER runbook_log_delete AFTER DELETE ON {source} REFERENCING OLD TABLE AS removed
  FOR EACH STATEMENT EXECUTE FUNCTION {log_function}();
CREATE TRIGGER runbook_log_truncate AFTER TRUNCATE ON {source}
  FOR EACH STATEMENT EXECUTE FUNCTION {truncate_function}('log');
ALTER TABLE {source} ENABLE ALWAYS TRIGGER runbook_log_insert;
ALTER TABLE {source} ENABLE ALWAYS TRIGGER runbook_log_update;
ALTER TABLE {source} ENABLE ALWAYS TRIGGER runbook_log_delete;
ALTER TABLE {source} ENABLE ALWAYS TRIGGER runbook_log_truncate;

-- name: switch_off
DROP TRIGGER IF EXISTS runbook_log_insert ON {source};
DROP TRIGGER IF EXISTS runbook_log_update ON {source};
DROP TRIGGER IF EXISTS runbook_log_delete ON {source};
DROP TRIGGER IF EXISTS runbook_log_truncate ON {source}

-- name: switch_on_back
-- Row triggers here, cloned to every partition: a statement trigger on the root sees nothing of a MERGE that moves a
-- row (15 to 18), nor of writes made directly to a partition.
CREATE TRIGGER runbook_log_back AFTER INSERT OR UPDATE OR DELETE ON {source}
  FOR EACH ROW EXECUTE FUNCTION {back_function}();
ALTER TABLE {source} ENABLE ALWAYS TRIGGER runbook_log_back

-- name: switch_on_back_leaf
ALTER TABLE {leaf} ENABLE ALWAYS TRIGGER runbook_log_back

-- name: switch_on_back_truncate
CREATE TRIGGER runbook_log_truncate AFTER TRUNCATE ON {table}
  FOR EACH STATEMENT EXECUTE FUNCTION {truncate_function}('back');
ALTER TABLE {table} ENABLE ALWAYS TRIGGER runbook_log_truncate

-- name: switch_off_back
DROP TRIGGER IF EXISTS runbook_log_back ON {source};
DROP TRIGGER IF EXISTS runbook_log_truncate ON {source}

-- name: switch_off_back_truncate
DROP TRIGGER IF EXISTS runbook_log_truncate ON {leaf}

-- name: hold
-- Before the snapshot: a table rewritten or truncated after it would be read as empty.
LOCK TABLE {origin} IN ACCESS SHARE MODE

-- name: truncated
SELECT EXISTS (SELECT FROM {log} k WHERE ROW({k_keys}) IS NULL)

-- name: forget_truncation
DELETE FROM {log} k WHERE ROW({k_keys}) IS NULL

-- name: length
SELECT count(*) FROM {log} k

-- name: forget_changed
-- Rows that are equal to the last byte already are left alone.
DELETE FROM {copy} d USING (SELECT DISTINCT {keys} FROM {log}) k
 WHERE {d_is_k} AND NOT EXISTS (SELECT FROM {origin} s WHERE {s_is_k} AND {s_row}::record *= {d_row}::record)

-- name: forget_all_changed
-- While settling, a row that moved between two ranges may stand twice: every changed key goes.
DELETE FROM {copy} d USING (SELECT DISTINCT {keys} FROM {log}) k WHERE {d_is_k}

-- name: take_changed
INSERT INTO {copy} ({columns}) OVERRIDING SYSTEM VALUE
SELECT {s_columns} FROM {origin} s JOIN (SELECT DISTINCT {keys} FROM {log}) k ON {s_is_k}
 WHERE {s_placed} AND NOT EXISTS (SELECT FROM {copy} d WHERE {d_is_k} AND {s_row}::record *= {d_row}::record)

-- name: take_all_changed
INSERT INTO {copy} ({columns}) OVERRIDING SYSTEM VALUE
SELECT {s_columns} FROM {origin} s JOIN (SELECT DISTINCT {keys} FROM {log}) k ON {s_is_k} WHERE {s_placed}

-- name: remember_nulls
-- Rows to be replayed whose key the original does not have: what stood in for it is not to become theirs.
DROP TABLE IF EXISTS pg_temp.runbook_nulls;
CREATE TEMP TABLE runbook_nulls ON COMMIT DROP AS SELECT DISTINCT {k_keys} FROM {log} k JOIN {copy} d ON {d_is_k} WHERE d.{key} IS NULL

-- name: restore_nulls
UPDATE {copy} d SET {key} = NULL FROM pg_temp.runbook_nulls k WHERE {d_is_k} AND ROW(d.{key})::record *= ROW(CAST({null_value} AS {key_type}))::record

-- name: clear
-- A key whose row has no partition key yet stays in the log: the cut-over waits for it.
-- Counted, which the planner cannot turn into a scan of all rows without one.
DELETE FROM {log} k WHERE (SELECT count(*) FROM {origin} s WHERE {s_is_k} AND NOT ({s_placed})) = 0

-- name: vacuum
-- A log that was long would still be read to its end, and be planned for as if it were long: 4,000 keys with a scan of all rows.
-- Its file is shortened only between two statements of its writers: under steady writes that was waited for, up to five seconds.
VACUUM (ANALYZE, SKIP_LOCKED, TRUNCATE {shorten}) {log}

-- name: note_unplaced
INSERT INTO {log} SELECT {s_pk} FROM {origin} s WHERE NOT ({s_placed})

-- name: trigger_states
-- The log's triggers as they are: a disabled one, or one made again (another xmin), means that changes went unseen.
SELECT string_agg(tgname || ' ' || tgenabled::text || ' ' || xmin::text, ', ' ORDER BY tgname) AS states
  FROM pg_trigger WHERE tgrelid = {oid} AND NOT tgisinternal AND tgname LIKE 'runbook\_%'

-- name: logging_back
-- Of every partition: its file, and the log's triggers. What differs from what was remembered may have gone unlogged: triggers
-- switched off for a while, a partition attached or detached, a TRUNCATE of one that came later.
SELECT string_agg(concat_ws(' ', t.relid::oid, pg_relation_filenode(t.relid), g.states), ', ' ORDER BY t.relid) AS states
  FROM pg_partition_tree({source_text}::regclass) t
  LEFT JOIN (SELECT tgrelid, string_agg(concat_ws(' ', tgname, tgenabled, xmin), ' ' ORDER BY tgname) AS states FROM pg_trigger
              WHERE tgname IN ('runbook_log_back', 'runbook_log_truncate') GROUP BY tgrelid) g ON g.tgrelid = t.relid
