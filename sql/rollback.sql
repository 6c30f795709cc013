-- 90 and 91: the way back, and the end.

-- name: resync
-- Every key that differs goes into the log: after a TRUNCATE, or when partitions were attached or detached since.
DELETE FROM {back} k WHERE ({k_keys}) IS NULL;
INSERT INTO {back} SELECT {either_pk} FROM {source} s FULL JOIN {retired} d ON {d_is_s}
 WHERE ({s_pk}) IS NULL OR ({d_pk}) IS NULL OR NOT {s_row}::record *= {d_row}::record

-- name: columns
SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
 WHERE attrelid = {table_text}::regclass AND attnum > 0 AND NOT attisdropped

-- name: doubles
-- What was unique in the original and is not any more.
SELECT ROW({columns})::text AS key, count(*) AS rows FROM {source} WHERE ({columns}) IS NOT NULL GROUP BY {columns} HAVING count(*) > 1 LIMIT 10

-- name: drop_partitioned
DROP TABLE {shadow}

-- name: drop_staging
-- The logs and their functions; the shadow is gone before.
DROP SCHEMA IF EXISTS {staging} CASCADE

-- name: drop_retired
DROP TABLE IF EXISTS {retired}

-- name: set_default
ALTER TABLE {reference} ALTER COLUMN {role_column} SET DEFAULT {frequent}

-- name: last_filled
-- How long ago the fill trigger was last needed, in hours; NULL when never.
SELECT (extract(epoch FROM clock_timestamp() - max(at)) / 3600)::float8 AS hours, count(*) AS rows FROM {filled}
