-- The shadow: the table to be, in a schema of its own until the cut-over, with its partitions and no index yet.

-- name: create_shadow
-- ACCESS SHARE on the source. The names are the final ones; only the schema is another. An event trigger may have enabled
-- row-level security, as some hosts have it; what the source has of it follows at the cut-over.
CREATE TABLE {shadow} (LIKE {source} INCLUDING ALL EXCLUDING INDEXES EXCLUDING CONSTRAINTS EXCLUDING STATISTICS EXCLUDING IDENTITY) PARTITION BY {partition_by} {tablespace};
ALTER TABLE {shadow} DISABLE ROW LEVEL SECURITY

-- name: require_key
ALTER TABLE {shadow} ALTER COLUMN {key} SET NOT NULL

-- name: add_identity
-- A sequence of its own under the name of the source's; LIKE would choose another name.
ALTER TABLE {shadow} ALTER COLUMN {column} ADD GENERATED {when} AS IDENTITY (SEQUENCE NAME {sequence} {options})

-- name: create_partition
-- Autovacuum keeps away until the rows are in; the source's own storage options follow then.
CREATE TABLE {leaf} PARTITION OF {shadow} {bound} WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off) {tablespace}

-- name: create_unplaced
-- Takes the rows that no partition takes, so that an unknown key never stops a replay; must be empty at the cut-over.
CREATE TABLE {unplaced} PARTITION OF {shadow} DEFAULT

-- name: create_sample
CREATE TEMPORARY TABLE runbook_sample AS SELECT {s_columns} FROM ONLY {source} s LIMIT {size}

-- name: try_rows
-- With the search_path of the sessions that will copy: the table's own functions may need it.
SET LOCAL search_path TO DEFAULT;
INSERT /* runbook */ INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE SELECT {s_columns} FROM ONLY {source} s WHERE {some} LIMIT {size}

-- name: try_default
-- The row looks for its partition before anything else is asked of it.
SET LOCAL search_path TO DEFAULT;
INSERT /* runbook */ INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE SELECT {only} FROM (SELECT ({default})::{type} AS d) made WHERE d IS NOT NULL

-- name: insert_sample
INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE SELECT * FROM pg_temp.runbook_sample

-- name: empty_sample
TRUNCATE {tables}

-- name: size_of
SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relname = ANY ({names}::text[])

-- name: revoke
-- What default privileges gave. The source's own grants follow at the cut-over; a later partition gets those of the others.
REVOKE ALL ON {object} FROM {roles}

-- name: statistics
ALTER TABLE {table} ALTER COLUMN {column} SET STATISTICS {target}

-- name: column_options
ALTER TABLE {table} ALTER COLUMN {column} SET ({options})

-- name: comment_constraint
COMMENT ON CONSTRAINT {constraint} ON {table} IS {comment}

-- name: comment_index
COMMENT ON INDEX {index} IS {comment}

-- name: staged
SELECT c.relname AS partition, pg_get_expr(c.relpartbound, c.oid) AS bound
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
 WHERE i.inhparent = {shadow_text}::regclass ORDER BY c.relname

-- name: drop
DROP TABLE IF EXISTS {shadow};
DROP SCHEMA IF EXISTS {staging} CASCADE

-- name: try_guard
-- What the trigger that keeps a key unique will compute of a row.
SELECT count(tried) FROM (SELECT {values} FROM (SELECT * FROM ONLY {source} LIMIT {size}) r {where} OFFSET 0) tried

-- name: take_sample
CREATE TEMP TABLE runbook_sample AS SELECT * FROM ONLY {source} LIMIT {size}
