-- 01: a copy of the table in one snapshot, and the proof that it is one.

-- name: copy
-- One statement, one snapshot; columns and rows, no index, no default: it is kept to be read.
CREATE TABLE {backup} AS SELECT {all_columns} FROM ONLY {source} s

-- name: restrict
-- The copy holds what the source holds: nobody but its owner may read it. What default privileges gave is gone before.
ALTER TABLE {backup} OWNER TO {owner}

-- name: sums
-- Count and hash sum, by list for every value of the key.
SELECT {value} AS value, count(*) AS rows, coalesce(sum({s_plain_hash}), 0)::text AS hash FROM {table} s GROUP BY 1 ORDER BY 1 NULLS FIRST

-- name: comment
COMMENT ON TABLE {backup} IS {comment}

-- name: exists
SELECT to_regclass({backup_text}) IS NOT NULL

-- name: bytes
SELECT pg_table_size({backup_text}::regclass)

-- name: drop
DROP TABLE IF EXISTS {backup}

-- name: rename
ALTER TABLE {backup} RENAME TO {to}

-- name: create_scratch
CREATE DATABASE {scratch} TEMPLATE template0

-- name: drop_scratch
DROP DATABASE IF EXISTS {scratch} WITH (FORCE)
