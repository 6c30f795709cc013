-- 07: what the application must change. Whatever is tried here is rolled back, on the table itself after the cut-over and
-- on a temporary copy of some rows before it; `runbook_row` is one of its rows, `runbook_key` a key of another partition.

-- name: leaves
-- Partitions, of whatever table: an application names their root.
SELECT n.nspname AS schema, c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relispartition

-- name: types
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = {schema} AND c.relname = {table} AND a.attnum > 0 AND NOT a.attisdropped

-- name: indexes
SELECT n.nspname AS schema, t.relname AS "table", c.relname AS name, pg_get_indexdef(c.oid) AS definition, ARRAY(
         SELECT a.attname FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid)::text[] AS columns
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
 WHERE t.relname = ANY ({tables}::name[])

-- name: columns
SELECT a.attname AS name, a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS required, a.attidentity = 'a' AS always FROM pg_attribute a
 WHERE a.attrelid = {relation}::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum

-- name: copy_rows
INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE SELECT {s_columns} FROM {source} s WHERE {some} LIMIT 200 ON CONFLICT DO NOTHING

-- name: copy_reference
CREATE TEMP TABLE {copy} (LIKE {original} INCLUDING DEFAULTS INCLUDING GENERATED) ON COMMIT DROP;
ALTER TABLE {copy} ADD COLUMN IF NOT EXISTS {role_column} {role_type} {default} {not_null};
INSERT /* runbook */ INTO {copy} ({its_columns}, {role_column}) SELECT {r_columns}, s.{key} FROM {original} r JOIN {name} s ON {r_is_s}
 WHERE s.{key} IS DISTINCT FROM {frequent} LIMIT 10;
INSERT /* runbook */ INTO {copy} ({its_columns}, {role_column}) SELECT {r_columns}, s.{key} FROM {original} r JOIN {name} s ON {r_is_s} LIMIT 10;
ALTER TABLE {copy} ADD CONSTRAINT {constraint} {definition}

-- name: samples
CREATE TEMP TABLE runbook_row ON COMMIT DROP AS SELECT * FROM ({some}) s LIMIT 1;
CREATE TEMP TABLE runbook_key ON COMMIT DROP AS SELECT {key} FROM ({some}) s OFFSET 1 LIMIT 1;
INSERT INTO runbook_key SELECT {fallback}::{key_type} WHERE NOT EXISTS (SELECT FROM runbook_key) AND {fallback} IS NOT NULL

-- name: sample
(SELECT {columns} FROM {leaf} LIMIT 1)

-- name: take
-- A row of a referencing table, if there is one of another role than the most frequent one; it is inserted again then.
CREATE TEMP TABLE runbook_its (LIKE {reference}) ON COMMIT DROP;
WITH gone AS (DELETE FROM {reference} WHERE ctid = (
    SELECT place FROM ((SELECT ctid AS place FROM {reference} WHERE ({columns_listed}) IS NOT NULL AND {role_column} IS DISTINCT FROM {frequent} LIMIT 1)
             UNION ALL (SELECT ctid FROM {reference} WHERE ({columns_listed}) IS NOT NULL LIMIT 1)) r LIMIT 1) RETURNING *)
INSERT INTO runbook_its SELECT * FROM gone

-- name: defer
SET CONSTRAINTS ALL DEFERRED

-- name: at_once
SET CONSTRAINTS {constraint} IMMEDIATE

-- name: insert
INSERT INTO {reference} ({its_columns}) {its_overriding}SELECT {its_columns} FROM runbook_its RETURNING {role_column}

-- name: insert_instead
INSERT INTO {reference} ({its_columns}, {role_column}) {its_overriding}
SELECT {its_columns}, (SELECT s.{key} FROM {table} s WHERE {s_is_its}) FROM runbook_its RETURNING {role_column}

-- name: wrong_role
INSERT INTO {reference} ({its_columns}, {role_column}) {its_overriding}SELECT {its_columns}, (
  SELECT k.{key} FROM (SELECT {key} FROM runbook_row UNION ALL SELECT {key} FROM runbook_key) k
   WHERE k.{key} <> (SELECT s.{key} FROM {table} s WHERE {s_is_its}) LIMIT 1) FROM runbook_its

-- name: wrong_role_instead
INSERT INTO {reference} ({its_columns}, {role_column}) {its_overriding}
SELECT {its_columns}, (SELECT s.{key} FROM {table} s WHERE {s_is_its}) FROM runbook_its RETURNING {role_column}

-- name: conflict
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row ON CONFLICT ({unique_columns}) DO NOTHING

-- name: conflict_instead
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row ON CONFLICT{target} DO NOTHING

-- name: duplicate
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row

-- name: duplicate_instead
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row ON CONFLICT DO NOTHING

-- name: double
INSERT INTO {table} ({columns}) {overriding}SELECT {columns_elsewhere} FROM runbook_row

-- name: double_instead
SELECT count(*) FROM {table} s JOIN runbook_row o ON {s_is_o_before}

-- name: upsert
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row
ON CONFLICT ({new_pk}) DO UPDATE SET {key} = (SELECT {key} FROM runbook_key)

-- name: upsert_instead
UPDATE {table} s SET {key} = (SELECT {key} FROM runbook_key) FROM runbook_row o WHERE {s_is_o}

-- name: inserted
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row
ON CONFLICT ({new_pk}) DO UPDATE SET {key} = EXCLUDED.{key} RETURNING xmax = 0 AS inserted

-- name: inserted_instead
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row ON CONFLICT DO NOTHING RETURNING true AS inserted

-- name: null_key
INSERT INTO {table} ({columns}) {overriding}SELECT {columns_without} FROM runbook_row

-- name: null_key_instead
INSERT INTO {table} ({columns}) {overriding}SELECT {columns} FROM runbook_row ON CONFLICT DO NOTHING

-- name: copy_out
COPY {table} TO STDOUT

-- name: copy_out_instead
COPY (SELECT * FROM {table} LIMIT 1) TO STDOUT

-- name: freeze
COPY {table} FROM STDIN WITH (FREEZE)

-- name: freeze_instead
COPY {table} FROM STDIN

-- name: place
SELECT count(*) FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table} LIMIT 10))

-- name: place_instead
SELECT count(*) FROM {leaf} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {leaf} LIMIT 10))

-- name: size
SELECT pg_total_relation_size({relation})

-- name: size_instead
SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree({relation})

-- name: analyzed
SELECT last_autoanalyze FROM pg_stat_all_tables WHERE relid = {relation}::regclass

-- name: analyzed_instead
ANALYZE {table} ({key})

-- name: locks
EXPLAIN SELECT FROM {table} WHERE {first}::text = '';
SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'AccessShareLock' AND relation IN (
  SELECT relid FROM pg_partition_tree({relation}) UNION SELECT indexrelid FROM pg_partition_tree({relation}) JOIN pg_index ON indrelid = relid)

-- name: locks_instead
EXPLAIN SELECT FROM {table} WHERE {first}::text = '' AND {key} = {frequent};
SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'AccessShareLock' AND relation IN (
  SELECT relid FROM pg_partition_tree({relation}) UNION SELECT indexrelid FROM pg_partition_tree({relation}) JOIN pg_index ON indrelid = relid)

-- name: triggers
-- On a table of its own: a trigger on the real one would need a lock on it.
CREATE TEMP TABLE moved (id integer, part text) PARTITION BY LIST (part) ON COMMIT DROP;
CREATE TEMP TABLE moved_a PARTITION OF moved FOR VALUES IN ('a') ON COMMIT DROP;
CREATE TEMP TABLE moved_b PARTITION OF moved FOR VALUES IN ('b') ON COMMIT DROP;
CREATE TEMP TABLE fired (what text) ON COMMIT DROP;
INSERT INTO moved VALUES (1, 'a');
CREATE FUNCTION pg_temp.fire() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO pg_temp.fired VALUES (concat_ws(' ', TG_WHEN, TG_OP, CASE TG_LEVEL WHEN 'STATEMENT' THEN 'of the statement' END));
  RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE TRIGGER before_row BEFORE INSERT OR UPDATE OR DELETE ON moved FOR EACH ROW EXECUTE FUNCTION pg_temp.fire();
CREATE TRIGGER after_row AFTER INSERT OR UPDATE OR DELETE ON moved FOR EACH ROW EXECUTE FUNCTION pg_temp.fire();
CREATE TRIGGER after_statement AFTER UPDATE ON moved FOR EACH STATEMENT EXECUTE FUNCTION pg_temp.fire();
UPDATE moved SET part = 'b';
SELECT string_agg(what, ', ') FROM fired

-- name: prepared
CREATE TEMP TABLE grown (id integer) ON COMMIT DROP;
PREPARE runbook_all AS SELECT * FROM grown;
ALTER TABLE grown ADD COLUMN part text;
EXECUTE runbook_all

-- name: prepared_instead
CREATE TEMP TABLE grown (id integer) ON COMMIT DROP;
PREPARE runbook_named AS SELECT id FROM grown;
ALTER TABLE grown ADD COLUMN part text;
EXECUTE runbook_named

-- name: moving
-- Two sessions and a commit: on a table of its own, which goes at once.
DROP TABLE IF EXISTS {moving};
CREATE TABLE {moving} (id integer, part text) PARTITION BY LIST (part);
CREATE UNLOGGED TABLE {moving_a} PARTITION OF {moving} FOR VALUES IN ('a');
CREATE UNLOGGED TABLE {moving_b} PARTITION OF {moving} FOR VALUES IN ('b');
INSERT INTO {moving} VALUES (1, 'a')

-- name: moving_waits
DECLARE waiting CURSOR FOR SELECT * FROM {moving} WHERE id = 1 FOR UPDATE

-- name: moving_moves
UPDATE {moving} SET part = 'b' WHERE id = 1

-- name: moving_again
SELECT part FROM {moving} WHERE id = 1 FOR UPDATE

-- name: filled
-- Rows whose writer did not know of the role column.
SELECT coalesce(t, referencing) AS "table", count(*) FILTER (WHERE at > now() - interval '1 day') AS "since yesterday", count(at) AS rows, max(at) AS last
  FROM unnest({tables}::name[]) t FULL JOIN {filled} ON referencing = t GROUP BY 1 ORDER BY 1
