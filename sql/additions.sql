-- 20: more partitions for a table that is partitioned: each made as a table of its own, checked, and attached.

-- name: tree
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind = 'p' AS partitioned, pg_get_expr(c.relpartbound, c.oid) AS bound,
       pg_table_size(c.oid) AS table_bytes
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE i.inhparent = {oid} ORDER BY c.oid

-- name: half_detached
-- Partitions whose DETACH ... CONCURRENTLY was broken off: through the table nobody sees their rows, and they would be dropped with it.
WITH RECURSIVE below AS (
  SELECT i.inhrelid, i.inhparent, i.inhdetachpending FROM pg_inherits i WHERE i.inhparent = {oid}
  UNION ALL SELECT i.inhrelid, i.inhparent, i.inhdetachpending FROM pg_inherits i JOIN below b ON i.inhparent = b.inhrelid)
SELECT inhrelid::regclass::text AS name, format('ALTER TABLE %s DETACH PARTITION %s FINALIZE', inhparent::regclass, inhrelid::regclass) AS finalize
  FROM below WHERE inhdetachpending ORDER BY 1

-- name: create_twin
-- Temporary, and taken back again: the server itself judges the new bounds beside the old ones, and says what each takes.
CREATE TEMPORARY TABLE runbook_twin (LIKE {root}) PARTITION BY {partition_by}

-- name: create_twin_partition
CREATE TEMPORARY TABLE {leaf} PARTITION OF pg_temp.runbook_twin {bound}

-- name: bound
SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = {leaf}::regclass

-- name: rule
SELECT pg_get_partition_constraintdef({leaf}::regclass) AS rule

-- name: waiting
-- Rows that the default partition holds because the new one is not there yet.
SELECT count(*) AS rows FROM ONLY {default} WHERE {rule}

-- name: breaking
SELECT count(*) AS rows FROM ONLY {default} WHERE {rule} AND NOT {check}

-- name: ranges
-- What each partition takes; NULL for a side that does not end.
SELECT n.nspname AS schema, c.relname AS name, nullif(substring(b.bound FROM 'FROM \(''?(.*?)''?\) TO '), 'MINVALUE') AS low, nullif(substring(b.bound FROM ' TO \(''?(.*?)''?\)$'), 'MAXVALUE') AS high
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) b
 WHERE i.inhparent = {oid} AND b.bound <> 'DEFAULT'

-- name: front
-- Partitions one after the other, without a gap between them, are a row; it is gone on with the one in which now lies, or that began
-- last before it, and of numbers with the longest: what lies far off has a partition of its own. Not min() and max(), which not every type has. `next` is where the following row begins.
WITH range AS (SELECT low::{type} AS low, high::{type} AS high FROM unnest({lows}::text[], {highs}::text[]) r (low, high)),
     first AS (SELECT low, high, lag(high) OVER (ORDER BY low NULLS FIRST) IS DISTINCT FROM low AS first FROM range),
     numbered AS (SELECT low, high, sum(first::int) OVER (ORDER BY low NULLS FIRST) AS number FROM first),
     found AS (SELECT number, count(*) AS partitions, (array_agg(low ORDER BY low))[1] AS begins, bool_or(low IS NULL) AS from_ever,
                      CASE WHEN NOT bool_or(high IS NULL) THEN (array_agg(high ORDER BY high DESC))[1] END AS ends FROM numbered GROUP BY number)
SELECT ends::text AS ends, lead AS next FROM (SELECT *, lead(begins) OVER (ORDER BY number)::text AS lead FROM found) f
 ORDER BY from_ever OR coalesce(begins <= {now}, true) DESC, CASE WHEN {now} IS NULL THEN partitions END DESC NULLS LAST,
          CASE WHEN {now} IS NULL THEN -number ELSE number END DESC LIMIT 1

-- name: uncovered
-- What is to be added of each step: from where the partitions end that it goes on from, to where the next one begins.
WITH taken AS (SELECT low::{type} AS low, high::{type} AS high FROM unnest({lows}::text[], {highs}::text[]) r (low, high)),
     begun AS (SELECT name, number, greatest(low::{type}, {ends}::text::{type}) AS low, high::{type} AS high
                 FROM unnest({names}::text[], {froms}::text[], {tos}::text[]) WITH ORDINALITY s (name, low, high, number)),
     pieces AS (SELECT name, number, low, high FROM begun  -- also what a partition leaves of a step that ends within it
                UNION SELECT s.name, s.number, t.high, s.high FROM begun s JOIN taken t ON t.high > s.low AND coalesce(t.high < s.high, true)),
     ended AS (SELECT name, number, low, least(high, (SELECT t.low FROM taken t WHERE t.low >= s.low ORDER BY t.low LIMIT 1)) AS high FROM pieces s)
SELECT name, low::text, high::text FROM ended s
 WHERE (high IS NULL OR low IS NULL OR low < high)
   AND NOT EXISTS (SELECT FROM taken t WHERE coalesce(t.low <= s.low, true) AND coalesce(t.high > s.low, true)) ORDER BY number, s.low NULLS FIRST

-- name: highest
-- The last row's key, or now.
SELECT greatest((SELECT {key} FROM {root} WHERE {finite} ORDER BY {key} DESC NULLS LAST LIMIT 1), {now})::text AS highest

-- name: referencing
-- Foreign keys that point at the table, as they are to be made again.
SELECT k.conname AS name, n.nspname AS schema, c.relname AS table, c.relkind = 'p' AS partitioned, k.convalidated AS validated,
       pg_get_constraintdef(k.oid) AS definition, obj_description(k.oid, 'pg_constraint') AS comment
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.confrelid = {oid} AND k.contype = 'f' AND k.conparentid = 0 ORDER BY n.nspname, c.relname, k.conname

-- name: stood_aside
-- Keys that runs of 20 made again NOT VALID, and that were valid; also runs that died. It is in their ledger rows.
SELECT DISTINCT k ->> 0 AS schema, k ->> 1 AS table, k ->> 2 AS name
  FROM runbook.action a CROSS JOIN LATERAL jsonb_array_elements(a.evidence -> 'aside') k
 WHERE a.migration = {migration} AND a.step = 'add' AND a.state = 'done'

-- name: own_indexes
-- Indexes of a partition that the root does not have: attaching would not make them.
SELECT indexrelid::regclass::text AS index, (SELECT relname FROM pg_class WHERE oid = indexrelid) AS name FROM pg_index i
 WHERE indrelid = {oid} AND indisvalid AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid)

-- name: attached_indexes
-- Those that attaching made, each with what the sibling's of the same root index is to it.
SELECT x.relname AS name, i.indisreplident AS replica_identity, i.indisclustered AS clustered,
       (SELECT jsonb_object_agg(a.attnum, to_jsonb(a) -> 'attstattarget') FROM pg_attribute a
         WHERE a.attrelid = i.indexrelid AND (to_jsonb(a) ->> 'attstattarget')::int >= 0) AS statistics
  FROM pg_index i JOIN pg_inherits h ON h.inhrelid = i.indexrelid JOIN pg_inherits g ON g.inhparent = h.inhparent
  JOIN pg_index l ON l.indexrelid = g.inhrelid AND l.indrelid = {leaf_text}::regclass JOIN pg_class x ON x.oid = l.indexrelid
 WHERE i.indrelid = {sibling}

-- name: identity
ALTER TABLE {leaf} REPLICA IDENTITY {kind}

-- name: cluster
ALTER TABLE {leaf} CLUSTER ON {index}

-- name: index_statistics
ALTER INDEX {index} ALTER COLUMN {number} SET STATISTICS {target}

-- name: truncate_triggers
-- Triggers on TRUNCATE are no row triggers: a new partition does not inherit them.
SELECT replace(pg_get_triggerdef(t.oid), ' ON ' || t.tgrelid::regclass || ' ', ' ON ' || {leaf_text} || ' ') AS definition,
       t.tgname AS name, t.tgenabled = 'A' AS always
  FROM pg_trigger t WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgtype & 32 = 32 ORDER BY t.tgname

-- name: make
-- ACCESS SHARE on the root. Nobody knows this table yet; its check is what the partition will take.
CREATE TABLE {leaf} (LIKE {root} INCLUDING ALL EXCLUDING IDENTITY EXCLUDING COMMENTS EXCLUDING STATISTICS,
  CONSTRAINT {check} CHECK ({rule})) {options} {tablespace}

-- name: statistics
-- The root's, of which LIKE would copy neither the target nor the owner (where we may give them to that one); `tail` is what stands
-- between name and table.
SELECT x.stxname AS name, nullif(to_jsonb(x) ->> 'stxstattarget', '-1') AS target,
       substr(w.whole, w.head, length(w.whole) - w.head + 1 - length(x.stxrelid::regclass::text)) AS tail,
       CASE WHEN (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
              OR pg_has_role(x.stxowner, 'MEMBER') AND has_schema_privilege(x.stxowner, c.relnamespace, 'CREATE') THEN pg_get_userbyid(x.stxowner)
            ELSE current_user END AS owner
  FROM pg_statistic_ext x JOIN pg_namespace n ON n.oid = x.stxnamespace JOIN pg_class c ON c.oid = x.stxrelid
 CROSS JOIN LATERAL (SELECT pg_get_statisticsobjdef(x.oid) AS whole, length(format('CREATE STATISTICS %I.%I', n.nspname, x.stxname)) + 1 AS head) w
 WHERE x.stxrelid = {oid} ORDER BY x.stxname

-- name: create_statistics
CREATE STATISTICS {statistics}{tail}{leaf}

-- name: own_statistics
ALTER STATISTICS {statistics} OWNER TO {owner}

-- name: target
ALTER STATISTICS {statistics} SET STATISTICS {target}

-- name: left_behind
-- A table that was made to be attached says so in its comment until it is.
SELECT c.relkind = 'r' AND NOT c.relispartition AND starts_with(coalesce(obj_description(c.oid, 'pg_class'), ''), {mark}) AS own
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {schema} AND c.relname = {name}

-- name: made
SELECT c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = {schema} AND c.relkind = 'r' AND NOT c.relispartition AND starts_with(obj_description(c.oid, 'pg_class'), {mark})

-- name: has_rows
SELECT EXISTS (SELECT FROM {leaf})

-- name: hold
LOCK TABLE {leaf} IN ACCESS EXCLUSIVE MODE

-- name: drop
-- Only what an earlier run made, empty, and did not come to attach.
DROP TABLE {leaf}

-- name: grants
-- What all partitions have been granted; what only some have is meant for these. Where there is row-level security, none: a grant
-- on a partition bypasses the root's policies.
WITH leaf AS (SELECT c.* FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = {oid}),
granted AS (
  SELECT l.oid, NULL AS attribute, a.grantee, a.privilege_type, a.is_grantable
    FROM leaf l CROSS JOIN LATERAL aclexplode(l.relacl) a WHERE a.grantee <> l.relowner
  UNION ALL
  SELECT l.oid, quote_ident(t.attname), a.grantee, a.privilege_type, a.is_grantable
    FROM leaf l JOIN pg_attribute t ON t.attrelid = l.oid AND NOT t.attisdropped
   CROSS JOIN LATERAL aclexplode(t.attacl) a WHERE a.grantee <> l.relowner),
by_all AS (
  SELECT g.attribute, g.grantee, g.privilege_type, bool_and(g.is_grantable) AS grantable
    FROM granted g GROUP BY 1, 2, 3 HAVING count(DISTINCT g.oid) = (SELECT count(*) FROM leaf))
SELECT string_agg(concat(privilege_type, ' (' || attribute || ')'), ', ' ORDER BY privilege_type, attribute) AS privileges,
       CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END || CASE WHEN grantable THEN ' WITH GRANT OPTION' ELSE '' END AS who
  FROM by_all
 WHERE NOT EXISTS (SELECT FROM pg_class r WHERE r.relrowsecurity AND (r.oid = {oid} OR r.oid IN (SELECT oid FROM leaf)))
 GROUP BY grantee, grantable ORDER BY 2

-- name: grant
GRANT {privileges} ON {leaf} TO {who}

-- name: trigger_states
-- Constraint triggers are the application's, too; those of keys are not.
SELECT tgname AS name, tgenabled::text AS state FROM pg_trigger t LEFT JOIN pg_constraint k ON k.oid = t.tgconstraint
 WHERE tgrelid = {table_text}::regclass AND coalesce(k.contype = 't', true) AND tgenabled <> 'D' ORDER BY 1

-- name: row_triggers
SELECT tgname AS name FROM pg_trigger t LEFT JOIN pg_constraint k ON k.oid = t.tgconstraint
 WHERE tgrelid = {oid} AND coalesce(k.contype = 't', true) AND tgtype & 1 = 1

-- name: add_key
ALTER TABLE {table} ADD CONSTRAINT {constraint} {definition} NOT VALID

-- name: set_trigger
ALTER TABLE {table} {state} TRIGGER {trigger}

-- name: move
-- The rows change nothing but their place: no trigger fires, no key refers to them at this moment.
INSERT INTO {leaf} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM ONLY {default} WHERE {rule};
DELETE FROM ONLY {default} WHERE {rule}

-- name: published
SELECT EXISTS (SELECT FROM pg_publication_tables WHERE to_regclass(format('%I.%I', schemaname, tablename)) IN ({root_text}::regclass, {default_text}::regclass))

-- name: published_by_name
-- Publications of which a subscriber looks for each partition by its own name.
SELECT DISTINCT p.pubname AS name FROM pg_publication p JOIN pg_publication_tables t USING (pubname) JOIN pg_inherits i ON i.inhparent = {oid}
 WHERE NOT p.pubviaroot AND to_regclass(format('%I.%I', t.schemaname, t.tablename)) = i.inhrelid ORDER BY 1

-- name: move_out
-- Where the table is published: a subscriber is told of the rows' leaving, and of their coming only when they come into a partition.
CREATE TEMPORARY TABLE runbook_moved ON COMMIT DROP AS SELECT {columns} FROM ONLY {default} WHERE {rule};
DELETE FROM ONLY {default} WHERE {rule}

-- name: move_in
INSERT INTO {leaf} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM pg_temp.runbook_moved

-- name: attach
-- SHARE UPDATE EXCLUSIVE on the root, for which no reader or writer waits; SHARE ROW EXCLUSIVE on tables that reference it; and
-- ACCESS EXCLUSIVE on the default partition, which is read through. The new table's check spares it that.
ALTER TABLE {root} ATTACH PARTITION {leaf} {bound};
ALTER TABLE {leaf} DROP CONSTRAINT {check};
COMMENT ON TABLE {leaf} IS NULL

-- name: upkeep
-- Each of these locks this partition, not the others; readers and writers of the other partitions go on.
-- Empty it. (TRUNCATE would be refused where foreign keys point at the table.)
DELETE FROM {leaf};
-- Readers and writers of this partition go on, too.
VACUUM (ANALYZE) {leaf};
-- CONCURRENTLY: readers and writers of this partition go on, too; without it writers of this partition wait.
REINDEX TABLE CONCURRENTLY {leaf};
-- Refused while rows of it are referenced, and where there is a default partition: then without CONCURRENTLY, which
-- takes ACCESS EXCLUSIVE on the root for an instant.
ALTER TABLE {root} DETACH PARTITION {leaf} CONCURRENTLY;
-- SHARE UPDATE EXCLUSIVE on the root. With a validated check of its bounds nothing is read through.
ALTER TABLE {root} ATTACH PARTITION {leaf} {bound}
