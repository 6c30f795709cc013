-- 08: how the partitions fare. Everything here only reads.

-- name: partitions
-- Rows and dead rows as the statistics have them; scans count since the statistics were reset.
SELECT c.relnamespace::regnamespace::name AS schema, c.relname AS name, coalesce(pg_get_expr(c.relpartbound, c.oid), '') AS bound, pg_total_relation_size(c.oid) AS bytes,
       greatest(s.n_live_tup, c.reltuples::bigint, 0) AS rows, coalesce(s.n_dead_tup, 0) AS dead,
       coalesce(s.seq_scan, 0) AS whole_scans, coalesce(s.idx_scan, 0) AS index_scans,
       greatest(s.last_vacuum, s.last_autovacuum) AS vacuumed, greatest(s.last_analyze, s.last_autoanalyze) AS analyzed
  FROM pg_partition_tree({root}) t JOIN pg_class c ON c.oid = t.relid LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
 WHERE t.isleaf ORDER BY c.relname

-- name: indexes
SELECT s.relname AS partition, s.indexrelname AS index, s.idx_scan AS scans, pg_relation_size(s.indexrelid) AS bytes
  FROM pg_partition_tree({root}) t JOIN pg_stat_all_indexes s ON s.relid = t.relid ORDER BY 1, 2

-- name: default_rows
SELECT count(*) AS rows FROM {leaf}

-- name: default_values
SELECT coalesce({key}::text, 'NULL') AS value, count(*) AS rows FROM {leaf} GROUP BY 1 ORDER BY 2 DESC

-- name: log
SELECT pg_total_relation_size(to_regclass({back})) AS bytes

-- name: history
-- Every look of this migration, partition by partition.
SELECT a.id, a.started_at AS at, p.name, p.rows, p.dead, p.bytes / 1e6 AS "MB", p.whole_scans + p.index_scans AS scans
  FROM runbook.action a CROSS JOIN jsonb_to_recordset(a.evidence -> 'partitions')
       AS p(name text, rows bigint, dead bigint, bytes bigint, whole_scans bigint, index_scans bigint)
 WHERE a.migration = {migration} AND a.step = 'monitor' AND a.action = 'look' AND a.state = 'done' ORDER BY a.id, p.name

-- name: first_values
SELECT a.evidence -> 'values' AS "values" FROM runbook.action a
 WHERE a.migration = {migration} AND a.step = 'monitor' AND a.action = 'look' AND a.state = 'done' ORDER BY a.id LIMIT 1

-- name: later
-- The partitions that begin after now, up to where they end; the last one first.
SELECT schema, name FROM unnest({schemas}::text[], {names}::text[], {lows}::text[], {highs}::text[]) r (schema, name, low, high)
 WHERE coalesce(low::{type} > {now}, low IS NOT NULL AND {now} IS NULL) AND high::{type} <= {ends}::text::{type} ORDER BY low::{type} DESC

-- name: untaken
-- Whose value no partition takes; the rules name the key only.
SELECT p.name FROM unnest({names}::text[], {values}::text[]) p (name, value)
 WHERE (SELECT {taken} FROM (SELECT p.value::{key_type} AS {key}) placed) IS NOT TRUE

-- name: current
-- Of ranges of time the one in which now lies.
SELECT name, {now}::text AS value FROM unnest({names}::text[], {bounds}::text[]) p (name, bound)
 CROSS JOIN LATERAL (SELECT nullif(substring(bound FROM 'FROM \(''?(.*?)''?\) TO '), 'MINVALUE') AS low, nullif(substring(bound FROM ' TO \(''?(.*?)''?\)$'), 'MAXVALUE') AS high) r
 WHERE {now} IS NOT NULL AND bound <> 'DEFAULT' AND coalesce(low::{type} <= {now}, true) AND coalesce(high::{type} > {now}, true)
