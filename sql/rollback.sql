-- 90 and 91: the way back, and the end.

-- name: resync
-- Every key that differs goes into the log: after a TRUNCATE, or when partitions were attached or detached since.
DELETE FROM {back} k WHERE ROW({k_keys}) IS NULL;
INSERT INTO {back} SELECT {either_pk} FROM {source} s FULL JOIN {retired} d ON {d_is_s}
 WHERE ROW({s_pk}) IS NULL OR ROW({d_pk}) IS NULL OR NOT {s_row}::record *= {d_filled_row}::record

-- name: original
SELECT EXISTS (SELECT FROM pg_class c WHERE c.oid = to_regclass({retired_text}) AND (c.oid = {source_oid}::bigint::oid OR EXISTS (
         SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND x.relname = ANY ({indexes}::text[]))))

-- name: tried
-- Whether an attempt failed since the cut-over: it may have brought changes into the original already.
SELECT count(*) > 1 FROM runbook.action WHERE migration = {migration} AND (step, action) = ('rollback', 'swap') AND state IN ('started', 'failed')
   AND id > (SELECT max(id) FROM runbook.action WHERE migration = {migration} AND (step, action, state) = ('cutover', 'swap', 'done'))

-- name: dropped
-- Partitions of the plan, or added since, that are no table any more, by no other name either; or that were made anew since: `then`
-- has the tables that the cut-over made, NULL in a restored database.
SELECT p.name, p.bound, there.oid IS NOT NULL AS anew FROM runbook.migration m CROSS JOIN LATERAL (
       SELECT p ->> 'name' AS name, p ->> 'bound' AS bound, true AS planned FROM jsonb_array_elements(m.plan -> 'partitions') p
       UNION SELECT a.name, NULL, false FROM ({added}) a(name)) p
  LEFT JOIN LATERAL (SELECT c.oid FROM pg_partition_tree({source_text}::regclass) t JOIN pg_class c ON c.oid = t.relid
                      WHERE pg_get_expr(c.relpartbound, c.oid) = p.bound OR c.oid = to_regclass(format('%I.%I', m.plan -> 'table' ->> 'schema_name', p.name))
                      ORDER BY pg_get_expr(c.relpartbound, c.oid) = p.bound DESC LIMIT 1) there ON true
 WHERE m.id = {migration} AND CASE WHEN there.oid IS NULL THEN to_regclass(format('%I.%I', m.plan -> 'table' ->> 'schema_name', p.name)) IS NULL
                                   ELSE p.planned AND there.oid <> ALL ({then}::oid[]) END
 ORDER BY 1

-- name: probe
-- What the server makes of a bound.
CREATE TEMP TABLE {probe} (LIKE {retired}) PARTITION BY {partition_by};
CREATE TEMP TABLE {leaf} PARTITION OF {probe} {bound}

-- name: bound
-- As a condition; by hash it names the partitioned table by its number.
SELECT replace(coalesce(pg_get_partition_constraintdef({leaf_text}::regclass), 'true'), format('%L::oid', {probe_text}::regclass::oid),
               format('%L::regclass', {source_text}::regclass)) AS condition

-- name: takers
SELECT coalesce(pg_get_partition_constraintdef(relid), 'true') AS bound FROM pg_partition_tree({source_text}::regclass) WHERE isleaf

-- name: unknown
-- Of a default partition, or one of which the bound is not known: rows that no partition takes, or that no log knows of.
({nobody}) OR NOT EXISTS (SELECT FROM {back} k WHERE {d_is_k})

-- name: missing
-- Rows of the original that are not in the table, and would go: those that belonged to the partition, and how many of them the log
-- knows of, which were changed since the cut-over, or deleted.
SELECT count(*) AS rows, count(*) FILTER (WHERE EXISTS (SELECT FROM {back} k WHERE {d_is_k})) AS logged FROM {retired} d
 WHERE ({belonged}) AND NOT EXISTS (SELECT FROM {source} s WHERE {d_is_s})

-- name: put_back
INSERT INTO {source} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {retired} d WHERE ({belonged}) AND NOT EXISTS (SELECT FROM {source} s WHERE {d_is_s})

-- name: set_aside
-- Tables that were its partitions when it was cut over, and stand for themselves now.
SELECT c.oid::regclass::text AS name FROM pg_class c WHERE c.oid = ANY ({then}::oid[]) AND c.relkind = 'r' AND NOT c.relispartition ORDER BY 1

-- name: surplus
SELECT count(*) FROM {retired} d WHERE NOT EXISTS (SELECT FROM {source} s WHERE {d_is_s}) AND NOT EXISTS (SELECT FROM {back} k WHERE {d_is_k})

-- name: entangled
-- Open migrations of which one's table refers to the other's by a role column. The one that has the column in its plan came later,
-- and its original needs what belongs to it; where neither did before its cut-over, the one that added it came later.
WITH swapped AS (SELECT migration AS id FROM runbook.action WHERE (step, action, state) = ('cutover', 'swap', 'done')),
     added AS (SELECT migration AS id FROM runbook.action WHERE (step, action, state) = ('foreign_keys', 'columns', 'done')),
     pair AS (SELECT u.id AS referenced, u.source AS referenced_table, a.id AS referencing, a.source AS referencing_table, r ->> 'role_column' AS role_column,
                     a.plan -> 'columns' @> jsonb_build_array(jsonb_build_object('name', r -> 'role_column')) AS knows_it
                FROM runbook.migration u CROSS JOIN jsonb_array_elements(u.plan -> 'references') r
                JOIN runbook.migration a ON (a.plan -> 'table' ->> 'schema_name', a.plan -> 'table' ->> 'name') = (r ->> 'schema_name', r ->> 'table')
               WHERE (r ->> 'adds_column')::boolean AND u.state = 'open' AND a.state = 'open' AND a.id IN (SELECT id FROM swapped) AND u.id IN (SELECT id FROM added)
                 AND to_regclass(format('%I.%I', r ->> 'schema_name', r ->> 'table')) IS NOT NULL)
SELECT referencing_table AS later, role_column, referencing_table AS holder, true AS knows_it,
       (SELECT plan ->> 'key' FROM runbook.migration a WHERE a.id = referencing) <> role_column AS can_end
  FROM pair WHERE referenced = {migration} AND knows_it
UNION ALL SELECT referenced_table, role_column, referencing_table, false, false FROM pair WHERE {migration} = referencing AND NOT knows_it

-- name: undoes
-- Open migrations whose way back ends with this one.
SELECT DISTINCT a.source FROM runbook.migration u CROSS JOIN jsonb_array_elements(u.plan -> 'references') r
  JOIN runbook.migration a ON (a.plan -> 'table' ->> 'schema_name', a.plan -> 'table' ->> 'name') = (r ->> 'schema_name', r ->> 'table')
 WHERE u.id = {migration} AND (r ->> 'adds_column')::boolean AND a.state = 'open' AND to_regclass(format('%I.%I', r ->> 'schema_name', r ->> 'table')) IS NOT NULL
   AND EXISTS (SELECT FROM runbook.action WHERE migration = a.id AND (step, action, state) = ('cutover', 'swap', 'done'))
   AND NOT a.plan -> 'columns' @> jsonb_build_array(jsonb_build_object('name', r -> 'role_column'))

-- name: columns
SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
 WHERE attrelid = {table_text}::regclass AND attnum > 0 AND NOT attisdropped

-- name: owners
-- Of the table and its original, where these differ.
SELECT pg_get_userbyid(t.relowner) AS owner, pg_get_userbyid(o.relowner) AS former FROM pg_class t JOIN pg_class o ON o.relowner <> t.relowner
 WHERE t.oid = {source_text}::regclass AND o.oid = to_regclass({retired_text})

-- name: doubles
-- What was unique in the original and is not any more.
SELECT ROW({columns})::text AS key, count(*) AS rows FROM {source} WHERE ROW({columns}) IS NOT NULL GROUP BY {columns} HAVING count(*) > 1 LIMIT 10

-- name: drop_partitioned
DROP TABLE {shadow}

-- name: triggered
-- Tables with triggers of the logs' functions, which go with them; partitions come with their root.
SELECT DISTINCT n.nspname AS schema, c.relname AS name
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE t.tgfoid IN (SELECT p.oid FROM pg_proc p JOIN pg_namespace s ON s.oid = p.pronamespace WHERE s.nspname = {staging_name})
   AND NOT c.relispartition ORDER BY 1, 2

-- name: elsewhere
-- Where a key to the table is that has this name, or triggers are that belong to a referencing table.
SELECT n.nspname AS schema, c.relname AS name, g.triggered FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace s ON s.oid = p.pronamespace
                                     WHERE t.tgrelid = c.oid AND s.nspname = {staging_name}
                                       AND (t.tgname LIKE '~runbook\_%' OR t.tgname LIKE 'runbook\_reference\_%'))) g(triggered)
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
   AND (g.triggered OR EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'f' AND k.conname = {key_name}
                                                             AND k.confrelid = to_regclass({source_text}))) ORDER BY 1, 2

-- name: on_role
-- Indexes, constraints and statistics on a role column that are none of the runbook's.
SELECT DISTINCT pg_describe_object(d.classid, d.objid, 0) AS what FROM pg_depend d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.refobjid, d.refobjsubid)
  LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = to_regclass({reference_text}) AND a.attname = {role_text} AND d.deptype = 'a'
   AND d.classid IN ('pg_class'::regclass, 'pg_constraint'::regclass, 'pg_statistic_ext'::regclass)
   AND (k.oid IS NULL OR k.contype <> 'n' AND k.conparentid = 0 AND k.conname <> ALL ({our_keys}::text[] || {check_text}::text)) ORDER BY 1

-- name: older_sessions
-- The application's sessions that were there before the swap.
SELECT a.pid FROM pg_stat_activity a WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.application_name NOT LIKE 'runbook %'
   AND a.backend_start < (SELECT max(finished_at) FROM runbook.action WHERE migration = {migration} AND (step, action, state) = ('cutover', 'swap', 'done')) ORDER BY 1

-- name: set_default
ALTER TABLE IF EXISTS {reference} ALTER COLUMN {role_column} SET DEFAULT {frequent}

-- name: last_filled
-- Hours since the fill trigger came with the swap, and since it was last needed (the same when it never was).
SELECT h.trigger_hours, coalesce((extract(epoch FROM clock_timestamp() - max(f.at)) / 3600)::float8, h.trigger_hours) AS hours, count(f.at) AS rows
  FROM (SELECT coalesce(extract(epoch FROM clock_timestamp() - max(finished_at)) / 3600, 1e6)::float8 AS trigger_hours FROM runbook.action
         WHERE migration = {migration} AND (step, action) IN (('cutover', 'swap'), ('foreign_keys', 'check')) AND state = 'done') h
  LEFT JOIN {filled} f ON true GROUP BY h.trigger_hours

-- name: free_sequence
ALTER SEQUENCE {sequence} OWNED BY NONE
