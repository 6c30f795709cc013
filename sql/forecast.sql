-- 00 and 06: what a sample tells of the whole. It is copied within a transaction that is rolled back, into tables that nobody
-- else ever sees; nothing that exists is locked but as a reader does.

-- name: measured
-- The statement as it runs, with the WAL that it wrote.
EXPLAIN (ANALYZE, WAL, TIMING OFF, FORMAT JSON) {query}

-- name: sizes
-- Of the tables in some schemas: bytes of their rows, with what is stored beside, and bytes of their indexes. Indexes of a
-- guard are counted with it, as its rows are.
SELECT coalesce(sum(pg_relation_size(c.oid) + CASE WHEN c.reltoastrelid <> 0 THEN pg_total_relation_size(c.reltoastrelid) ELSE 0 END), 0)::bigint AS table_bytes,
       coalesce(sum(pg_indexes_size(c.oid)), 0)::bigint AS index_bytes
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY ({schemas}) AND c.relkind = 'r'

-- name: analyze_few
SET LOCAL default_statistics_target = 10

-- name: create_referencing
CREATE TABLE {sample} (LIKE {reference} INCLUDING INDEXES);
INSERT INTO {sample} SELECT * FROM ONLY {reference} r WHERE r.ctid < {last}::tid;
ANALYZE {sample}

-- name: referencing
SELECT count(*) AS rows, pg_total_relation_size({sample_text}::regclass) AS bytes FROM {sample}

-- name: drop
-- With the sample's keys that refer to it.
DROP TABLE {shadow} CASCADE

-- name: add_column
ALTER TABLE {sample} ADD COLUMN {role_column} {role_type} {default}

-- name: fill
UPDATE {sample} SET {role_column} = {role_column}

-- name: add_key
ALTER TABLE {sample} ADD FOREIGN KEY ({key_columns}) REFERENCES {shadow} ({key_referenced}) NOT VALID

-- name: look_up
-- What the validation of a key asks.
SELECT count(*) FROM {sample} w LEFT JOIN {shadow} v ON {w_is_v} WHERE v.{key} IS NULL

-- name: folder
-- Where the table lies; only who sees that folder can tell how much is free. NULL for a role that may not know.
SELECT coalesce(nullif(pg_tablespace_location(c.reltablespace), ''),
         CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('data_directory', true) END) AS folder
  FROM pg_class c WHERE c.oid = {oid}

-- name: done
-- Each action, the last time that it was done, rolled back since or not.
SELECT DISTINCT ON (step, action) step, action, rows, sentence, evidence, started_at AS at, extract(epoch FROM finished_at - started_at)::float8 AS seconds
  FROM runbook.action WHERE migration = {migration} AND state IN ('done', 'undone') ORDER BY step, action, id DESC
