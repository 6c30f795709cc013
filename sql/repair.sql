-- The repair of a migration that went wrong elsewhere: the table is partitioned, rows are missing, a backup has them.

-- name: root
-- How the table is partitioned, and by which columns.
SELECT CASE p.partstrat WHEN 'l' THEN 'list' WHEN 'r' THEN 'range' ELSE 'hash' END AS partition_by,
       (SELECT array_agg(a.attname ORDER BY k.ord) FROM unnest(p.partattrs::int2[]) WITH ORDINALITY k(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = k.attnum) AS columns
  FROM pg_partitioned_table p WHERE p.partrelid = {oid}

-- name: partitions
SELECT c.relname AS name, n.nspname AS schema, c.relkind = 'p' AS partitioned, pg_get_expr(c.relpartbound, c.oid) AS bound
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE i.inhparent = {oid} ORDER BY c.oid

-- name: rows
SELECT c.relname AS name, g.rows FROM (SELECT tableoid AS oid, count(*) AS rows FROM {table} GROUP BY 1) g JOIN pg_class c USING (oid)

-- name: frequent
SELECT {key}::text AS value FROM (SELECT {key} FROM {table} UNION ALL SELECT {key} FROM {backup}) s
 WHERE {key} IS NOT NULL GROUP BY {key} ORDER BY count(*) DESC, 1 LIMIT 1

-- name: unique
-- Whether these columns name one row of the backup each.
SELECT NOT EXISTS (SELECT FROM {backup} GROUP BY {columns} HAVING count(*) > 1) AND NOT EXISTS (
  SELECT FROM {backup} WHERE num_nulls({columns}) > 0)

-- name: homeless
-- Rows of the backup that the table lacks and no partition takes.
SELECT s.{key}::text AS value, count(*) AS rows FROM {backup} s
 WHERE {partition_of} = '(no partition)' AND NOT EXISTS (SELECT FROM {source} d WHERE {d_is_s})
 GROUP BY 1 ORDER BY 2 DESC LIMIT 10

-- name: twice
-- Rows that only the partition key tells from one another: what refers to them by the old key could be given any of theirs.
SELECT ROW({s_pk})::text AS key, count(*) AS rows FROM {source} s GROUP BY {s_pk} HAVING count(*) > 1 ORDER BY 1 LIMIT 6

-- name: put_back
-- The rows of the backup that the table lacks; those that it has are newer and stay. Its own triggers fire, and are not to change them.
INSERT INTO {source} ({columns}) OVERRIDING SYSTEM VALUE
SELECT {s_columns} FROM {backup} s WHERE NOT EXISTS (SELECT FROM {source} d WHERE {d_is_s})

-- name: changed
-- Of the rows that this transaction wrote, whatever fired for them: those that are not what the backup has.
SELECT count(*) FROM {source} d JOIN {backup} s ON {d_is_s}
 WHERE d.xmin = pg_current_xact_id()::xid AND {meant} IS DISTINCT FROM {became}

-- name: triggers
-- What fires for a row that is inserted.
SELECT DISTINCT t.tgname AS name FROM pg_partition_tree({oid}) p JOIN pg_trigger t ON t.tgrelid = p.relid
 WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & 4 = 4 ORDER BY 1

-- name: sequences
-- What gives an integer column its next number: an identity's sequence, or one of which the default is the next number and no more.
SELECT a.attname AS column, s.relname AS name, n.nspname AS schema, has_sequence_privilege(s.oid, 'UPDATE') AS may
  FROM pg_attribute a LEFT JOIN pg_attrdef f ON (f.adrelid, f.adnum) = (a.attrelid, a.attnum)
  JOIN pg_depend d ON (d.classid, d.refobjid, d.refobjsubid, d.deptype) = ('pg_class'::regclass, a.attrelid, a.attnum, 'i')
                   OR (d.classid, d.objid, d.refclassid) = ('pg_attrdef'::regclass, f.oid, 'pg_class'::regclass)
                      AND pg_get_expr(f.adbin, f.adrelid) ~ '^nextval\([^()]*\)$'
  JOIN pg_class s ON s.relkind = 'S' AND s.oid IN (d.objid, d.refobjid) JOIN pg_namespace n ON n.oid = s.relnamespace
 WHERE a.attrelid = {oid} AND a.attnum > 0 AND a.atttypid IN ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype)

-- name: behind
-- The last number that a row has, where the sequence has not come so far; the next one would clash.
SELECT m.last FROM pg_sequence q CROSS JOIN LATERAL (SELECT CASE WHEN q.seqincrement > 0 THEN max({column}) ELSE min({column}) END::bigint AS last FROM {source}) m
 WHERE q.seqrelid = {sequence_text}::regclass AND m.last BETWEEN q.seqmin AND q.seqmax
   AND sign(q.seqincrement) * (m.last - coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - q.seqincrement)) > 0

-- name: advance
SELECT setval({sequence_text}::regclass, {last})

-- name: missing
SELECT count(*) FROM {backup} s WHERE NOT EXISTS (SELECT FROM {source} d WHERE {d_is_s})

-- name: referencing
-- A table that references the source without a foreign key: what the key to come depends on.
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, pg_get_userbyid(c.relowner) AS owner,
       (SELECT array_agg(attname ORDER BY attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
       (SELECT bool_and(attnotnull) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = ANY ({columns})) AS not_null,
       (SELECT array_agg(conname) FROM pg_constraint k WHERE k.conrelid = c.oid) AS constraints,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND a.attname = ANY ({columns})) AS indexed
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid}

-- name: dangling
-- Rows that refer to nobody: neither in the table nor in the backup.
SELECT count(*) AS rows, (array_agg(DISTINCT ROW({w_columns})::text))[1:5] AS keys,
       count(DISTINCT ROW({w_columns})) > 5 AS more FROM {reference} w
 WHERE num_nulls({w_columns}) = 0 AND NOT EXISTS (SELECT FROM {source} v WHERE {w_is_v})
   AND NOT EXISTS (SELECT FROM {backup} v WHERE {w_is_v})

-- name: alike
SELECT {left_column} = {right_column} FROM {left_table} l, {right_table} r LIMIT 0

-- name: other_keys
SELECT k.conname AS name, k.confrelid::regclass::text AS referenced FROM pg_constraint k
 WHERE k.contype = 'f' AND k.conrelid = {reference_text}::regclass AND k.confrelid <> to_regclass({source_text})
   AND {same}::text[] = ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY u(number, n)
                                   JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number ORDER BY u.n) ORDER BY 1

-- name: key_exists
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = {reference_text}::regclass AND conname = {key_name})

-- name: fill_range
-- READ COMMITTED, and rows that somebody holds are skipped until the next round.
WITH target AS (
  SELECT w.ctid AS place, v.{key} AS value FROM {reference} w JOIN {source} v ON {w_is_v}
   WHERE w.ctid >= {first}::tid AND w.ctid < {last}::tid AND w.{role_column} IS DISTINCT FROM v.{key}
     FOR NO KEY UPDATE OF w SKIP LOCKED)
UPDATE {reference} r SET {role_column} = target.value FROM target WHERE r.ctid = target.place

-- name: wrong
SELECT count(*) FROM {reference} w JOIN {source} v ON {w_is_v} WHERE w.{role_column} IS DISTINCT FROM v.{key}

-- name: free
-- Of these the rows that nobody holds.
SELECT count(*) FROM (SELECT FROM {reference} w JOIN {source} v ON {w_is_v} WHERE w.{role_column} IS DISTINCT FROM v.{key}
   FOR NO KEY UPDATE OF w SKIP LOCKED) free
