-- 03: copying by block ranges, building the indexes in bulk, comparing.

-- name: blocks
SELECT pg_relation_size({source_oid}::oid) / current_setting('block_size')::bigint AS blocks, current_setting('block_size')::int AS block_size

-- name: copied
SELECT first_block, last_block, rows FROM runbook.copied_range WHERE migration = {migration} ORDER BY first_block

-- name: copy_range
-- No row is locked and no long snapshot held: a TID range scan of a few thousand blocks.
INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE
SELECT {s_columns} FROM ONLY {source} s WHERE s.ctid >= {first}::tid AND s.ctid < {last}::tid AND {s_placed}

-- name: copy_all
INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE
SELECT {s_columns} FROM ONLY {source} s WHERE {s_placed}

-- name: record_range
INSERT INTO runbook.copied_range (migration, first_block, last_block, rows) VALUES ({migration}, {first_block}, {last_block}, {rows})

-- name: start_again
TRUNCATE {shadow};
DELETE FROM runbook.copied_range WHERE migration = {migration}

-- name: create_index
CREATE {unique} INDEX {index} ON {leaf} USING {tail}

-- name: create_unique
CREATE UNIQUE INDEX {index} ON {leaf} ({columns}){include} {nulls}{rest}

-- name: adopt
ALTER TABLE {leaf} ADD CONSTRAINT {index} {kind} USING INDEX {index}{timing}

-- name: built
SELECT x.relname AS name, EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.oid AND k.conrelid = i.indrelid) AS adopted
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
 WHERE i.indrelid = {leaf_text}::regclass AND i.indisvalid

-- name: building
-- A session's CREATE INDEX has given the index its OID and is at work on it.
SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE pid = {pid} AND phase LIKE 'building%')

-- name: drop_index
DROP INDEX IF EXISTS {index}

-- name: wait_for_leftovers
-- What the workers of a run that died still do on the shadow ends before this is granted.
LOCK TABLE {shadow} IN SHARE ROW EXCLUSIVE MODE

-- name: storage
ALTER TABLE {leaf} RESET (autovacuum_enabled, toast.autovacuum_enabled)

-- name: storage_options
ALTER TABLE {leaf} SET ({options})

-- name: vacuum
-- The visibility map, for index-only scans.
VACUUM ({analyze}INDEX_CLEANUP off, TRUNCATE off) {leaf}

-- name: analyze_root
-- The root, which autovacuum never analyses, and before 18 with it every partition.
ANALYZE {only} {shadow}

-- name: homeless
SELECT {key}::text AS value, count(*) AS rows FROM {unplaced} GROUP BY 1 ORDER BY 2 DESC LIMIT 10

-- name: export_snapshot
SELECT pg_export_snapshot() AS snapshot

-- name: leaves
SELECT n.nspname AS schema, c.relname AS name FROM pg_partition_tree({parent}::regclass) t
  JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE t.isleaf ORDER BY c.oid

-- name: sums_of_leaf
-- sum, not xor: a row that stands twice must not cancel itself. No GROUP BY: it would cost half as much again.
SELECT {leaf_name} AS partition, count(*) AS rows, coalesce(sum({d_hash}), 0) AS hash FROM ONLY {leaf} d WHERE {d_counts}

-- name: sums_of_plain
SELECT count(*) AS rows, coalesce(sum({s_hash}), 0) AS hash FROM ONLY {plain} s WHERE {s_counts}

-- name: sums_of_plain_by_partition
-- The rules name the key only; within them it is what NULL becomes.
SELECT p.partition, count(*) AS rows, coalesce(sum({s_hash}), 0) AS hash
  FROM ONLY {plain} s CROSS JOIN LATERAL (SELECT {partition_of} AS partition FROM (SELECT {s_key} AS {key}) placed) p WHERE {s_counts} GROUP BY 1

-- name: not_waiting
NOT EXISTS (SELECT FROM {log} k WHERE {row_is_k})

-- name: differing
SELECT coalesce(a.key, b.key) AS key, CASE WHEN b.key IS NULL THEN 'missing in the copy' WHEN a.key IS NULL THEN 'only in the copy'
       ELSE 'different' END AS finding
  FROM (SELECT ROW({s_pk})::text AS key, {s_hash} AS hash FROM {origin} s WHERE NOT EXISTS (SELECT FROM {log} k WHERE {s_is_k})) a
  FULL JOIN (SELECT ROW({d_pk})::text AS key, {d_hash} AS hash FROM {copy} d WHERE NOT EXISTS (SELECT FROM {log} k WHERE {d_is_k})) b
    ON a.key = b.key
 WHERE a.hash IS DISTINCT FROM b.hash LIMIT {limit}

-- name: partition_rules
-- What each partition takes, as PostgreSQL itself would check it; the default partition's rule is "none of the others".
SELECT c.relname AS partition, pg_get_expr(c.relpartbound, c.oid) = 'DEFAULT' AS is_default, pg_get_partition_constraintdef(c.oid) AS rule
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = {parent}::regclass ORDER BY c.oid
