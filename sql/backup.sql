-- 01: a copy of the table in one snapshot, and the proof that it is one.

-- name: copy
-- One statement, one snapshot; columns and rows, no index, no default: it is kept to be read.
CREATE TABLE {backup} AS SELECT {all_columns} FROM ONLY {source} s

-- name: sums
-- Count and hash sum, by list for every value of the key.
SELECT {value} AS value, count(*) AS rows, coalesce(sum({s_plain_hash}), 0)::text AS hash FROM {table} s GROUP BY 1 ORDER BY 1 NULLS FIRST

-- name: as_proved
-- Its rows and their hash sum, and what the ledger has of both since it was made.
SELECT now.rows, proved.rows AS proved_rows, now.hash, proved.hash AS proved_hash, (now.rows, now.hash) = (proved.rows, proved.hash) AS same
  FROM (SELECT count(*) AS rows, coalesce(sum({s_plain_hash}), 0) AS hash FROM {table} s) now
 CROSS JOIN (SELECT coalesce(sum((sums ->> 'rows')::bigint), 0) AS rows, coalesce(sum((sums ->> 'hash')::numeric), 0) AS hash
               FROM (SELECT evidence FROM runbook.action
                      WHERE migration = {migration} AND (step, action, state) = ('backup', 'make', 'done') ORDER BY id DESC LIMIT 1) made
              CROSS JOIN jsonb_array_elements(made.evidence -> 'sums') sums) proved

-- name: measure
SELECT {backup_text}::regclass::oid::bigint AS oid, pg_table_size({backup_text}::regclass) AS bytes

-- name: ours
-- Whether the table that has the backup's name is the one that was made.
SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass({backup_text}) AND (oid = {oid} OR obj_description(oid, 'pg_class') = {comment})) AS ours

-- name: create_scratch
CREATE DATABASE {scratch} TEMPLATE template0

-- name: drop_scratch
DROP DATABASE IF EXISTS {scratch} WITH (FORCE)
